"""The models of the README's table: small enough that two CPU cores train one in a few minutes.

    make table TEXT=FOLDER_OF_NOVELS        # all thirteen: prepare, train, evaluate, print
    deconstruct train --config=configs/small.py:variant=approximate,layout=even --workdir=runs/table/approximate-even

0.9 M parameters, 512 pieces, 256 tokens of context, 2.5 M tokens of training. Nothing is tuned per variant.
"""

from deconstruct.config import default_config
from deconstruct.spelling import parse_argument


def get_config(argument=None):
    config = default_config()
    config.update(parse_argument(argument, {"variant": "standard", "layout": "uniform"}))
    config.data = "prepared/novels"
    config.steps = 1200
    config.batch_size = 8
    config.sequence_length = 256
    config.learning_rate = 2e-3
    config.checkpoint_every = 600
    config.log_every = 50
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.update(
        {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_layers": 4,
            "num_heads": 4,
            "dtype": "float32",
            "remat": False,
            "scan": False,  # four layers compile soon enough, and run faster unrolled on a CPU
        }
    )
    config.optimizer.update({"warmup_steps": 120, "beta2": 0.99})
    return config
