"""The state of a run: what a step maps to its successor, how it is made on a mesh, and what of it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deconstruct.config import Config
from deconstruct.distributed.sharding import replicated
from deconstruct.model.language_model import LanguageModel, init_options
from deconstruct.model.placement import abstract_arrays, split_model
from deconstruct.model.restack import to_layers, to_segments
from deconstruct.plan import Plan
from deconstruct.train.guard import new_guard


class TrainState(NamedTuple):
    """`step` is the number of completed updates, with those that were skipped. Holds arrays, or their shapes and
    shardings."""

    step: Any  # int32 []
    params: Any  # nested dicts of float32 arrays
    frozen: Any  # constants of the model
    opt_state: Any
    guard: Any  # what was skipped: a Guard


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """How to make and place a TrainState, and to put its arrays back into a live model."""

    graphdef: Any
    abstract: TrainState  # shapes and shardings
    init: Callable[[jax.Array | None], TrainState]  # tokens of the fixed text -> a sharded state
    begin: Callable[[Any, Any], TrainState]  # parameters and frozen arrays -> the sharded state that starts from them

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def make_state_spec(config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> StateSpec:
    graphdef, params, frozen = abstract_arrays(config.model, mesh)
    whole = replicated(mesh)

    def init(fixed_tokens: jax.Array | None) -> TrainState:
        model = LanguageModel(config.model, jax.random.key(config.seed))
        if fixed_tokens is not None and model.fixed is not None:
            model.fixed[...] = fixed_tokens
        _, params, frozen = split_model(model)
        return begin(params, frozen)

    def begin(params: Any, frozen: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), new_guard())

    # Moments have the shapes of the parameters and take their shardings; counters are replicated.
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    abstract = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        frozen=frozen,
        opt_state=opt_state,
        guard=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(new_guard)),
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return StateSpec(
        graphdef,
        abstract,
        jax.jit(init, out_shardings=shardings, compiler_options=init_options()),
        jax.jit(begin, out_shardings=shardings),
    )


def saved_form(state: TrainState, plan: Plan) -> tuple[Any, Any]:
    """The state (or its abstract form) as it is saved: the model's part and the trainer's, layers by index."""
    model = {"params": to_layers(state.params, plan), "frozen": state.frozen}
    return model, {"step": state.step, "opt_state": to_layers(state.opt_state, plan), "guard": state.guard}


def running_form(model: Any, train: Any, plan: Plan) -> TrainState:
    """The inverse of `saved_form`."""
    return TrainState(
        step=train["step"],
        params=to_segments(model["params"], plan),
        frozen=model["frozen"],
        opt_state=to_segments(train["opt_state"], plan),
        guard=train["guard"],
    )
