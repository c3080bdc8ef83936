"""A small hybrid that trains in a minute or two on two CPU cores: 4 layers, `non_approximate` in every other one.

    make quickstart

Text: the Python standard library's own sources. Expected: validation perplexity near 50 beside a unigram
perplexity of 372 (with Python 3.11; another Python has other sources).
"""

from deconstruct.config import default_config


def get_config():
    config = default_config()
    config.variant = "non_approximate"
    config.layout = "even"
    config.data = "prepared/quickstart"
    config.steps = 600
    config.batch_size = 8
    config.sequence_length = 256
    config.learning_rate = 2e-3
    config.checkpoint_every = 200
    config.log_every = 20
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.model.hidden_size = 128
    config.model.intermediate_size = 384
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.dtype = "float32"
    config.model.remat = False
    config.model.scan = False  # four layers compile soon enough, and run faster unrolled on a CPU
    config.optimizer.warmup_steps = 60
    config.optimizer.beta2 = 0.99
    return config
