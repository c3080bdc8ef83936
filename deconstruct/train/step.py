"""One update as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deconstruct.distributed.sharding import constrain
from deconstruct.train.state import TrainState

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def batch_of(rows: jax.Array, border: int | None = None) -> dict[str, jax.Array]:
    """Rows int32 [B, L + 1] -> inputs, targets (the next tokens) and weights, all [B, L].

    `border`: the id of an end of text, after which the next token, another document's first, has no weight.
    """
    tokens = rows[:, :-1]
    weights = jnp.ones(tokens.shape, jnp.float32) if border is None else (tokens != border).astype(jnp.float32)
    return {"tokens": tokens, "targets": rows[:, 1:], "weights": weights}


def make_step(
    graphdef: Any, optimizer: optax.GradientTransformation, schedule: optax.Schedule, accumulation: int = 1
) -> Step:
    """The step of a model. Loss = sum of token losses / sum of weights over the whole batch, over all microbatches.

    Metrics are device scalars: loss, grad_norm (before clipping), learning_rate, tokens (weighted targets).
    """

    def loss_sum(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, params, frozen)
        return model.loss(batch["tokens"], batch["targets"], batch["weights"])

    def gradients(state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        value_and_grad = jax.value_and_grad(loss_sum)
        if accumulation == 1:
            return value_and_grad(state.params, state.frozen, batch)

        def micro(carry: tuple[jax.Array, Any], part: dict[str, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
            part = {name: constrain(x, ("batch", None)) for name, x in part.items()}
            return jax.tree.map(jnp.add, carry, value_and_grad(state.params, state.frozen, part)), None

        parts = {name: x.reshape(accumulation, -1, x.shape[1]) for name, x in batch.items()}
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        return jax.lax.scan(micro, zero, parts)[0]

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        total = jnp.sum(batch["weights"])
        loss, grads = gradients(state, batch)
        scale = 1.0 / jnp.maximum(total, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss * scale,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "tokens": total,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return step
