"""The train step's programs, from shapes alone: for the devices of a mesh, whether they are here or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deconstruct.config import Config
from deconstruct.distributed.sharding import batch_spec
from deconstruct.train.distillation import Stage, Teacher, make_objective, moving_rows, replaced_layers
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import StateSpec
from deconstruct.train.step import batch_of, make_step


def lower_step(
    config: Config, spec: StateSpec, mesh: jax.sharding.Mesh, stage: Stage = "", teacher: Teacher | None = None
) -> jax.stages.Lowered:
    """(state, rows int32 [batch_size, sequence_length + 1]) -> (state, metrics), lowered for `mesh`; the state is
    donated. In a stage of distillation the teacher's arrays come last. Nothing is allocated or compiled."""
    return trace_step(config, spec, mesh, stage, teacher).lower()


def trace_step(
    config: Config, spec: StateSpec, mesh: jax.sharding.Mesh, stage: Stage = "", teacher: Teacher | None = None
) -> jax.stages.Traced:
    """The same before it is lowered."""
    schedule, spike = make_schedule(config), config.faults.spike
    special: dict[str, Any] = {}
    if teacher is not None:
        special["objective"] = make_objective(stage, config, teacher)
    if teacher is not None and stage == "mixer":
        replaced = replaced_layers(config.model.layers, teacher.model.layers)
        special["moving"] = moving_rows(config.model, replaced, spec.abstract.params)
    step = make_step(spec.graphdef, make_optimizer(config), schedule, config.accumulation, spike, **special)
    border = None if config.border_loss else config.model.end_of_text
    shape = (config.batch_size, config.sequence_length + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.sharding.NamedSharding(mesh, batch_spec()))
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda state, rows, *given: step(state, batch_of(rows, border), *given),
            donate_argnums=0,
            out_shardings=(spec.shardings, None),
        ).trace(spec.abstract, rows, *([teacher.abstract] if teacher is not None else []))
