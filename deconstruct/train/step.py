"""One update as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deconstruct.distributed.sharding import constrain
from deconstruct.model.language_model import LanguageModel
from deconstruct.train.guard import judge
from deconstruct.train.state import TrainState

# (state, batch, what the objective is given) -> (state, metrics)
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
# (model, batch, what the step is given) -> what is minimised, summed over the tokens by weight, float32 []
Objective = Callable[..., jax.Array]


def batch_of(rows: jax.Array, border: int | None = None) -> dict[str, jax.Array]:
    """Rows int32 [B, L + 1] -> inputs, targets (the next tokens) and weights, all [B, L].

    `border`: the id of an end of text, after which the next token, another document's first, has no weight.
    """
    tokens = rows[:, :-1]
    weights = jnp.ones(tokens.shape, jnp.float32) if border is None else (tokens != border).astype(jnp.float32)
    return {"tokens": tokens, "targets": rows[:, 1:], "weights": weights}


def next_token(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    """The ordinary objective."""
    return model.loss(batch["tokens"], batch["targets"], batch["weights"])


def make_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int = 1,
    spike: float = 0.0,
    objective: Objective = next_token,
    moving: Any = None,
) -> Step:
    """The step of a model. Loss = sum of token losses / sum of weights over the whole batch, over all microbatches.

    moving: for each parameter, bool [repeats] or []: which of its layers are updated; the others have no gradient, and
    weight decay does not pull on them. None: all.

    An update that `guard.judge` finds bad is not made; with `spike` of 0 only those that are not finite are. The
    schedule counts the updates that were made.

    Metrics are device scalars: loss, grad_norm (before clipping), learning_rate, tokens (weighted targets), skipped and
    in_a_row (updates not made: in all, and the last ones), and with `spike` update_norm (over the learning rate).
    """

    def loss_sum(params: Any, frozen: Any, batch: dict[str, jax.Array], given: tuple[Any, ...]) -> jax.Array:
        if moving is not None:
            params = jax.tree.map(lambda rows, p: _select(rows, p, jax.lax.stop_gradient(p)), moving, params)
        return objective(nnx.merge(graphdef, params, frozen), batch, *given)

    def gradients(state: TrainState, batch: dict[str, jax.Array], given: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        value_and_grad = jax.value_and_grad(loss_sum)
        if accumulation == 1:
            return value_and_grad(state.params, state.frozen, batch, given)

        def micro(carry: tuple[jax.Array, Any], part: dict[str, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
            part = {name: constrain(x, ("batch", None)) for name, x in part.items()}
            return jax.tree.map(jnp.add, carry, value_and_grad(state.params, state.frozen, part, given)), None

        parts = {name: x.reshape(accumulation, -1, x.shape[1]) for name, x in batch.items()}
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        return jax.lax.scan(micro, zero, parts)[0]

    def step(state: TrainState, batch: dict[str, jax.Array], *given: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        total = jnp.sum(batch["weights"])
        loss, grads = gradients(state, batch, given)
        scale = 1.0 / jnp.maximum(total, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if moving is not None:  # p + -0.0 has the bits of p, whatever p is
            updates = jax.tree.map(lambda rows, u: _select(rows, u, jnp.full_like(u, -0.0)), moving, updates)
        rate = schedule(state.step - state.guard.skipped)
        metrics = {"loss": loss * scale, "grad_norm": optax.tree.norm(grads), "learning_rate": rate, "tokens": total}
        if spike:
            metrics["update_norm"] = optax.tree.norm(updates) / jnp.maximum(rate, jnp.finfo(jnp.float32).tiny)
        good, guard = judge(state.guard, loss, metrics["grad_norm"], metrics.get("update_norm"), spike)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        params = kept(optax.apply_updates(state.params, updates), state.params)
        after = TrainState(state.step + 1, params, state.frozen, kept(opt_state, state.opt_state), guard)
        return after, {**metrics, "skipped": guard.skipped, "in_a_row": guard.in_a_row}

    return step


def _select(rows: np.ndarray, x: jax.Array, y: jax.Array) -> jax.Array:
    """x in the layers that `rows` names, bool [repeats] or [], y in the others."""
    if rows.all() or not rows.any():
        return x if rows.all() else y
    return jnp.where(rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim)), x, y)
