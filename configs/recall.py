"""Recall on demand: a model of two layers learns to look up what its document has said; which variants can?

    deconstruct prepare --input="recall:mqar(pairs=4,queries=11,keys=16,values=16,fillers=1,length=31)" \\
        --output=prepared/recall --row-length=32
    deconstruct train --config=configs/recall.py:variant=standard --workdir=runs/recall/standard
    deconstruct evaluate --workdir=runs/recall/standard --tasks=recall

0.1 M parameters, 2.5 M tokens of training: a minute or two on a core. Who knows the four values of a document, but not
whose they are, has an accuracy near 0.25. Measured over three seeds (docs/results.md): standard 0.93, maps that do not
follow the hidden states 0.45 to 0.53, their hybrids 0.84 to 0.96, mlp 0.06.
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
