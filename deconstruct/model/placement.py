"""A model as plain pytrees: split into definition, parameters and frozen arrays, and placed on a mesh."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from deconstruct.config import MeshConfig, ModelConfig
from deconstruct.distributed.mesh import make_mesh
from deconstruct.distributed.sharding import split_together, state_shardings, widths_left_whole
from deconstruct.layers import Frozen
from deconstruct.model.language_model import LanguageModel, abstract_model

log = logging.getLogger(__name__)


def mesh_for(
    config: ModelConfig, mesh: MeshConfig, devices: Sequence[jax.Device] | None = None, key: str = "config.mesh"
) -> jax.sharding.Mesh:
    """The mesh of a model over `devices` (default: all): what is left open (-1) is chosen to fit it, and said.

    Raises UserError, which names `key`, where the devices do not make it. What is asked for explicitly and does not
    divide a parameter is refused by `abstract_arrays`.
    """
    _, params = nnx.split(abstract_model(config))
    made = make_mesh(mesh, devices, split_together(params), key)
    whole = widths_left_whole(params)
    if made.shape["tensor"] > 1 and whole:
        widths = ", ".join(map(str, whole))
        log.info("mesh: tensor=%d leaves MLPs of matched width (%s) whole on each device", made.shape["tensor"], widths)
    return made


def split_model(model: LanguageModel) -> tuple[Any, Any, Any]:
    """graphdef, parameters, frozen arrays; the last two as pure dicts. `nnx.merge` puts them together again."""
    graphdef, *states = nnx.split(model, nnx.Param, Frozen)
    params, frozen = states
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def abstract_arrays(config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """The same with shapes and shardings on `mesh` in place of arrays. Raises UserError where they do not fit."""
    graphdef, *states = nnx.split(abstract_model(config), nnx.Param, Frozen)
    params, frozen = states

    def on_mesh(state: Any) -> Any:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            nnx.to_pure_dict(state),
            state_shardings(state, mesh),
        )

    return graphdef, on_mesh(params), on_mesh(frozen)


def decay_mask(config: ModelConfig) -> Any:
    """For each parameter, whether weight decay pulls on it: as it was said where the parameter is made."""
    params = nnx.state(abstract_model(config), nnx.Param)
    said = jax.tree.map(
        lambda variable: variable.get_metadata().get("decay", True),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return nnx.to_pure_dict(said)
