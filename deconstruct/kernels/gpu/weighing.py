"""How the logits of a pairwise form become weights, block by block of the keys.

    out_i = sum_{j<=i} w(x_ij) v_j / n_i,    n_i = sum_{j<=i} w(x_ij),    x_ij = q_i . k_j / sqrt(dh)

The backward pass has one number for each row, `kept`, from which it forms the row's normalised weights p = w / n and
slopes w' / n again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels.gpu import tensor_core


class Weighing(NamedTuple):
    """A form's arithmetic on a block of logits x, float32 [64, columns]; `seen` is bool of its shape, or None: all.

    start() -> what a row carries from block to block, a tuple of float32 [64]
    weigh(x, seen, carry) -> weights, by what earlier sums are to be multiplied ([64], or None: by one), the new carry
    finish(carry) -> n in the units of the sums, and `kept`, each float32 [64]
    again(x, kept) -> p and w' / n, where `kept` has the shape of x
    """

    start: Callable[[], tuple[jax.Array, ...]]
    weigh: Callable[..., tuple[jax.Array, jax.Array | None, tuple[jax.Array, ...]]]
    finish: Callable[[tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]]
    again: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _taylor_start() -> tuple[jax.Array, ...]:
    return (tensor_core.of_rows(0),)


def _taylor_weigh(x: jax.Array, seen: jax.Array | None, carry: tuple[Any, ...]) -> tuple[jax.Array, None, Any]:
    slope = 1 + x
    weights = slope * slope * 0.5 + 0.5
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    return weights, None, (carry[0] + weights.sum(axis=1),)


def _taylor_finish(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return carry[0], 1 / carry[0]


def _taylor_again(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    slope = 1 + x
    return (slope * slope * 0.5 + 0.5) * kept, slope * kept


# w(x) = 1 + x + x^2 / 2 = ((1 + x)^2 + 1) / 2, w' = 1 + x. No weight is below 1/2: no maximum is needed. 1 / n is kept.
TAYLOR = Weighing(_taylor_start, _taylor_weigh, _taylor_finish, _taylor_again)

LOG2E = math.log2(math.e)


def _softmax_start() -> tuple[jax.Array, ...]:
    return tensor_core.of_rows(-math.inf), tensor_core.of_rows(0)


def _softmax_weigh(x: jax.Array, seen: jax.Array | None, carry: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, Any]:
    before, sums = carry
    if seen is not None:
        x = jnp.where(seen, x, -math.inf)
    x = x * LOG2E
    highest = jnp.maximum(before, x.max(axis=1))
    decay = jnp.exp2(before - highest)
    weights = jnp.exp2(x - tensor_core.along_rows(highest, x.shape[1]))
    return weights, decay, (highest, sums * decay + weights.sum(axis=1))


def _softmax_finish(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    highest, sums = carry
    return sums, highest + jnp.log(sums) * LOG2E


def _softmax_again(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jnp.exp2(x * LOG2E - kept)
    return weights, weights


# w(x) = exp(x) relative to the running maximum; the first key is seen by all rows, so it is finite from the first block
# on. log2 of n is kept, with the maximum: exp2 is the GPU's own.
SOFTMAX = Weighing(_softmax_start, _softmax_weigh, _softmax_finish, _softmax_again)
