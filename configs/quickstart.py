"""A small hybrid that trains in a minute or two on two CPU cores: 6 layers, `non_approximate` in every other one.

    make quickstart

Text: the Python standard library's own sources. Expected: validation perplexity near 20 beside a unigram perplexity
near 280.
"""

from deconstruct.config import default_config


def get_config():
    config = default_config()
    config.variant = "non_approximate"
    config.layout = "even"
    config.data = "prepared/quickstart"
    config.steps = 300
    config.batch_size = 16
    config.sequence_length = 256
    config.learning_rate = 2e-3
    config.checkpoint_every = 100
    config.log_every = 10
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.model.hidden_size = 128
    config.model.intermediate_size = 384
    config.model.num_layers = 6
    config.model.num_heads = 4
    config.model.dtype = "float32"
    config.model.remat = False
    config.optimizer.warmup_steps = 30
    config.optimizer.beta2 = 0.99
    return config
