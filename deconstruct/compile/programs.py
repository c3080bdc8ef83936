"""The programs of a run, traced for devices that need not be here: an update, a batch of an evaluation, a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from deconstruct.config import Config
from deconstruct.distributed.mesh import check_batch
from deconstruct.evaluate.window_losses import WindowLosses
from deconstruct.generation.generator import Settings
from deconstruct.model.decode import Decoder
from deconstruct.model.placement import abstract_arrays
from deconstruct.train.ahead_of_time import trace_step
from deconstruct.train.optimizer import make_optimizer
from deconstruct.train.state import make_state_spec

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


PROGRAMS: dict[str, Callable[[Config, Mesh], jax.stages.Traced]] = {
    "train": train,
    "evaluate": evaluate,
    "decode": decode,
}
