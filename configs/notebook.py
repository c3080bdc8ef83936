"""The models of the notebooks: small enough that a CPU trains several while one reads.

    deconstruct prepare --output=prepared/notebooks --vocab-size=512 --row-length=256 --max-characters=4000000
    deconstruct train --config=configs/notebook.py --workdir=runs/notebooks/standard

4 layers, 0.2 M parameters, 512 pieces of the Python standard library's source, 64 tokens of context. Expected:
validation perplexity of 52 to 56 at context 64 (two seeds, Python 3.11), in 25 to 37 seconds of processor time.
"""

from deconstruct.config import default_config


def get_config():
    config = default_config()
    config.data = "prepared/notebooks"
    config.steps = 300
    config.batch_size = 8
    config.sequence_length = 64
    config.learning_rate = 1e-2
    config.checkpoint_every = 1000  # the last step is always saved
    config.log_every = 10
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.update(
        {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 4,
            "num_heads": 4,
            "init_std": 0.1,  # near 1 / sqrt(width): what is learned in so few steps starts from there
            "dtype": "float32",
            "remat": False,
            "scan": False,
        }
    )
    config.optimizer.update({"warmup_steps": 20, "beta2": 0.99})
    return config
