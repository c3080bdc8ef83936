"""Workdirs and checkpoint folders, tiny, made without torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.model.placement import abstract_arrays, split_model
from deconstruct.model.restack import to_layers
from deconstruct.run.checkpoint import Checkpoints
from deconstruct.run.workdir import Workdir
from tests.tiny import tiny_config

MODEL = {"num_layers": 4, "num_kv_heads": 2, "vocab_size": 261, "init_std": 0.2}  # 261: padded to 384


def make_config(model=None, **top):
    return tiny_config({**MODEL, **(model or {})}, **top)


def arrays_of(model):
    """The parameters and constants of a live model, by layer."""
    _, params, frozen = split_model(model)
    return {"params": to_layers(params, model.config.plan), "frozen": frozen}


def make_workdir(folder, config, step=3, seed=0):
    """A workdir with one checkpoint of random numbers: no norm is one and no bias zero, as trained ones are not."""
    _, params, frozen = abstract_arrays(config.model, single_device_mesh())
    generator = np.random.default_rng(seed)

    def draw(path, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return generator.integers(0, config.model.vocab_size, x.shape, np.int32)
        return 0.2 * generator.standard_normal(x.shape, np.float32) + (path[-1].key == "scale")

    tree = {"params": to_layers(params, config.model.plan), "frozen": frozen}
    place = Workdir(folder)
    place.folder.mkdir()
    place.write_config(config)
    meta = {"step": step, "config": config.to_dict(), "layout": list(config.model.layers), "tokenizer": "", "data": {}}
    with Checkpoints(place.checkpoints, every=1, keep=1) as writer:
        writer.save(step, jax.tree_util.tree_map_with_path(draw, tree), {"step": np.int32(step)}, meta)
    return place.folder
