"""Recall on demand: a model of two layers learns to look up what its document has said; which variants can?

    deconstruct prepare --input="recall:mqar(pairs=4,queries=11,keys=16,values=16,fillers=1,length=31)" \\
        --output=prepared/recall --row-length=32
    deconstruct train --config=configs/recall.py:variant=standard --workdir=runs/recall/standard
    deconstruct evaluate --workdir=runs/recall/standard --tasks=recall

0.1 M parameters, 5 M tokens of training on a CPU. Who knows the four values of a document, but not whose they are, has
an accuracy near 0.25 and a loss near 1.77; who knows both, a loss near 1.3. Measured (docs/evaluation.md): standard
0.82, non_approximate 0.44 after 2,000 steps.
"""

from deconstruct.config import default_config
from deconstruct.spelling import parse_argument


def get_config(argument=None):
    config = default_config()
    config.update(parse_argument(argument, {"variant": "standard", "layout": "uniform"}))
    config.data = "prepared/recall"
    config.steps = 1200
    config.batch_size = 64
    config.sequence_length = 32
    config.learning_rate = 1e-2
    config.checkpoint_every = 500
    config.log_every = 100
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 2,
            "rope_theta": 1e4,
            "dtype": "float32",
            "remat": False,
            "scan": False,
        }
    )
    config.optimizer.update({"warmup_steps": 100, "beta2": 0.99})
    return config
