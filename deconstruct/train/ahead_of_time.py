"""The train step's program, from shapes alone: for the devices of a mesh, whether they are here or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.config import Config
from deconstruct.distributed.sharding import batch_spec
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import StateSpec
from deconstruct.train.step import batch_of, make_step


def lower_step(config: Config, spec: StateSpec, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """(state, rows int32 [batch_size, sequence_length + 1]) -> (state, metrics), lowered for `mesh`; the state is
    donated. Nothing is allocated or compiled."""
    return trace_step(config, spec, mesh).lower()


def trace_step(config: Config, spec: StateSpec, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The same before it is lowered."""
    schedule, spike = make_schedule(config), config.faults.spike
    step = make_step(spec.graphdef, make_optimizer(config), schedule, config.accumulation, spike)
    border = None if config.border_loss else config.model.end_of_text
    shape = (config.batch_size, config.sequence_length + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.sharding.NamedSharding(mesh, batch_spec()))
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda state, rows: step(state, batch_of(rows, border)),
            donate_argnums=0,
            out_shardings=(spec.shardings, None),
        ).trace(spec.abstract, rows)
