"""How a model comes back out of a workdir: whole, or without the layers that are not standard."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

from deconstruct.config import Config, MeshConfig, ModelConfig
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.layout import replaced_layers
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.placement import abstract_arrays, mesh_for
from deconstruct.model.restack import rename_layers, to_layers, to_segments
from deconstruct.run import checkpoint, extensions
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

Skip = Literal["", "block", "mixer"]
FREE_KEYS = ("dtype", "impl", "scan", "remat")  # they change how a model is computed, not what it is


def restore_model(
    workdir: os.PathLike[str] | str,
    step: int | None = None,
    *,
    skip: Skip = "",
    mesh: jax.sharding.Mesh | MeshConfig | None = None,
    extension: str | Sequence[str] = (),
    allow_extensions: bool = False,
    **changes: Any,
) -> LanguageModel:
    """A live model from a checkpoint (default: the latest), its parameters alone, on whatever devices are here.

    skip: "block" leaves the layers that are not standard out altogether, "mixer" only their mixers' branches. mesh:
    where to put it, default the first device; a MeshConfig is made of all devices of this process. Keyword arguments
    change model settings that leave parameters alone (dtype, impl, scan, remat). extension: your copy of the file (or
    files) that define layers of the run, where the package does not; allow_extensions: run the copies kept in the
    workdir. Raises UserError, `CheckpointGoneError` where the step is not (or no longer) there.
    """
    run_dir = Workdir(workdir)
    step = run_dir.step(step)
    saved = Config.from_dict(checkpoint.read_meta(run_dir.checkpoints, step)["config"])
    files = (extension,) if isinstance(extension, str) else tuple(extension)
    extensions.load(run_dir, saved, extensions.Trust(files, allow_extensions))
    config, kept = skipped(_changed(saved.model, changes), skip)
    if isinstance(mesh, MeshConfig):
        mesh = mesh_for(config, mesh, jax.local_devices(), "--mesh")
    mesh = mesh or single_device_mesh()
    graphdef, params, frozen = abstract_arrays(config, mesh)
    abstract = {"params": to_layers(params, config.plan), "frozen": frozen}
    on_disk = {**abstract, "params": rename_layers(abstract["params"], dict(enumerate(kept)))}
    arrays = checkpoint.load_model(run_dir.checkpoints, step, on_disk, partial=bool(skip))
    by_layer = rename_layers(arrays["params"], {old: new for new, old in enumerate(kept)})
    shardings = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        params = jax.jit(lambda tree: to_segments(tree, config.plan), out_shardings=shardings)(by_layer)
    return nnx.merge(graphdef, params, arrays["frozen"])


def _changed(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    for key in changes:
        if key not in FREE_KEYS:
            raise UserError(f"restore_model: {key} cannot be changed; {', '.join(FREE_KEYS)} can")
    return dataclasses.replace(config, **changes)


def skipped(config: ModelConfig, skip: Skip) -> tuple[ModelConfig, tuple[int, ...]]:
    """The model without its layers that are not standard (or without their mixers), and the layers that are kept."""
    every = tuple(range(len(config.layers)))
    replaced = replaced_layers(config.layers)
    if not skip or not replaced:
        return config, every
    if skip == "mixer":
        return dataclasses.replace(config, without_mixers=True), every
    kept = tuple(i for i in every if i not in replaced)
    if not kept:
        raise UserError(
            "--skip removes every layer that is not standard, and this model has no other; it takes a hybrid"
        )
    layers = tuple(config.layers[i] for i in kept)
    return dataclasses.replace(config, layers=layers, num_layers=len(kept)), kept
