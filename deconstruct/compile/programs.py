"""The programs of a run, traced for devices that need not be here: an update, a batch of an evaluation, a token; and
the mixing of its layers by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.variants import Variant, find_variant
from deconstruct.config import Config
from deconstruct.distributed.mesh import check_batch
from deconstruct.distributed.sharding import KEYS, QUERIES, fitting_spec
from deconstruct.evaluate.window_losses import WindowLosses
from deconstruct.generation.generator import Settings
from deconstruct.kernels.mask import Mask
from deconstruct.model.decode import Decoder
from deconstruct.model.placement import abstract_arrays
from deconstruct.train.ahead_of_time import trace_step
from deconstruct.train.optimizer import make_optimizer
from deconstruct.train.state import make_state_spec
from deconstruct.types import UserError

Mesh = jax.sharding.Mesh


def train(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """One update. Raises UserError where the batch or the model does not divide over the mesh."""
    check_batch(config, mesh)
    return trace_step(config, make_state_spec(config, make_optimizer(config), mesh), mesh)


def evaluate(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """The losses of one batch of perplexity, at the run's sequence length."""
    return WindowLosses(mesh).trace(config.model, config.sequence_length)


def decode(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """One more token of each sequence, with caches as long as the run's sequences: of as many as `generate` takes
    together, or of one for each device that has a share of the batch."""
    model = dataclasses.replace(config.model, scan=False)
    batch = max(Settings().batch_size, mesh.shape["data"] * mesh.shape["fsdp"])
    return Decoder(nnx.merge(*abstract_arrays(model, mesh)), batch, config.sequence_length).trace()


def mix(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """The mixing of each layer that differs, with its gradients: the kernels that `model.impl` means there."""
    check_batch(config, mesh)
    layers = {name: find_variant(name) for name in config.model.layers}
    mixed = {name: _mixing(config, variant) for name, variant in layers.items() if variant.form is not None}
    if not mixed:
        raise UserError(f"--programs=mix: no layer of {', '.join(layers)} has attention")
    programs = {name: program for name, (program, _) in mixed.items()}

    def array(axes: tuple[str | None, ...], *shape: int, dtype: Any = config.model.dtype) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, fitting_spec(axes, shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = {name: tuple(array(*shape) for shape in shapes) for name, (_, shapes) in mixed.items()}
    begins = None
    if config.model.document_mask:
        begins = array(("batch", "length"), config.batch_size, config.sequence_length, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda inputs, begins: {name: program(Mask(begins), *inputs[name]) for name, program in programs.items()}
        ).trace(inputs, begins)


def _mixing(config: Config, variant: Variant) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """A function of a mask, q, k, v, a cotangent and what the form reads from, and these arrays' axes and sizes."""
    assert variant.form is not None and variant.source is not None
    form = variant.form(config.model, nnx.Rngs(0), **dict(variant.options))
    form.impl = config.model.impl

    def mixed(mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, x: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v, read: form.mix(q, k, v, mask, **read), q, k, v, form.read(x))
        return out, pull(g)

    batch, length = config.batch_size, config.sequence_length
    qk_batch = 1 if variant.source.fixed else batch
    queries = (length, config.model.num_heads, config.model.head_size)
    keys = (length, config.model.kv_heads, config.model.head_size)
    return mixed, [
        (QUERIES, qk_batch, *queries),
        (KEYS, qk_batch, *keys),
        (KEYS, batch, *keys),
        (QUERIES, batch, *queries),
        (("batch", "length", None), qk_batch, length, config.model.hidden_size),
    ]


PROGRAMS: dict[str, Callable[[Config, Mesh], jax.stages.Traced]] = {
    "train": train,
    "evaluate": evaluate,
    "decode": decode,
    "mix": mix,
}
BY_DEFAULT = ("train", "evaluate", "decode")
