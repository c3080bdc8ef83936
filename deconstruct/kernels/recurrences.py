"""The definitions of the recurrent forms with a decay, as dense maps: what their fast paths are tested against.

A recurrence that is linear in the values is a map: its output where the values are the unit vectors. So a state here
has a column for each position, [Bq, K, dh, L], and row i of the map is q_i times the state after i.

    gated_linear:  S_t = diag(a_t) S_{t-1} + k_t e_t^T                             (arXiv:2312.06635)
    gated_delta:   S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t e_t^T     (arXiv:2412.06464)

One position after the other, with nothing to cancel; time and memory are for definitions, L^2 dh for each head. A
document begins with a_t = 0. Maps are float32 (float64 for float64 inputs) and zero above the diagonal; rows do not sum
to one. The scale 1 / sqrt(dh) is applied here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped, recurrent_chunks
from deconstruct.kernels.mask import CAUSAL, Mask

# flash-linear-attention's: it keeps a zero vector zero, and its gradient finite.
NORM_EPSILON = 1e-6

_Update = Callable[[jax.Array, tuple[jax.Array, ...]], jax.Array]


def unit(x: jax.Array) -> jax.Array:
    """x / sqrt(sum x^2 + 1e-6) along the last axis, float32 (float64 for float64 inputs): unit length for the rule."""
    x = x.astype(grouped.accumulation_dtype(x))
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + NORM_EPSILON)


def gated_linear_weights(q: jax.Array, k: jax.Array, mask: Mask = CAUSAL, *, log_decay: jax.Array) -> jax.Array:
    """A_ij = sum_c q_ic k_jc exp(sum_{j<m<=i} g_mc) / sqrt(dh) for j <= i of one document: [Bq, H, L, L].

    q [Bq, L, H, dh], k [Bq, L, K, dh], log_decay g [Bq, L, K, dh], at most zero. ValueError for a mask with a window.
    """
    dtype = grouped.accumulation_dtype(q, k)
    decay = jnp.exp(recurrent_chunks.with_borders(log_decay.astype(dtype), mask, q.shape[0], q.shape[0]))

    def update(s: jax.Array, step: tuple[jax.Array, ...]) -> jax.Array:
        key, here, a = step
        return a[..., None] * s + key[..., None] * here

    return _rows(update, q.astype(dtype), k.astype(dtype), decay)


def gated_delta_weights(
    q: jax.Array, k: jax.Array, mask: Mask = CAUSAL, *, log_decay: jax.Array, beta: jax.Array
) -> jax.Array:
    """The map of the gated delta rule, [Bq, H, L, L], with q and k brought to unit length by `unit` first.

    q [Bq, L, H, dh], k [Bq, L, K, dh], log_decay g [Bq, L, K], at most zero, beta [Bq, L, K] in [0, 1]. ValueError for
    a mask with a window.
    """
    dtype = grouped.accumulation_dtype(q, k)
    decay = jnp.exp(recurrent_chunks.with_borders(log_decay.astype(dtype), mask, q.shape[0], q.shape[0]))

    def update(s: jax.Array, step: tuple[jax.Array, ...]) -> jax.Array:
        key, here, a, strength = step
        s = a[..., None, None] * s
        missing = here - (key[..., None] * s).sum(-2, keepdims=True)
        return s + strength[..., None, None] * key[..., None] * missing

    return _rows(update, unit(q.astype(dtype)), unit(k.astype(dtype)), decay, beta.astype(dtype))


def _rows(update: _Update, q: jax.Array, k: jax.Array, *gates: jax.Array) -> jax.Array:
    """The rows of the map, one position after the other; `update(state, (k_t, e_t, gates...))` is the state after t."""
    batch, length, kv_heads, dh = k.shape
    queries = jnp.moveaxis(grouped.split_queries(q, kv_heads), 3, 0)  # l b k g d
    keys, *others = (jnp.moveaxis(x, 1, 0) for x in (k, *gates))
    units = jnp.eye(length, dtype=k.dtype)[:, None, None, None]

    def step(s: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, *rest = at
        s = update(s, tuple(rest))
        return s, grouped.exactly("bkgd,bkdj->bkgj", query, s)

    start = jnp.zeros((batch, kv_heads, dh, length), k.dtype)
    _, rows = jax.lax.scan(step, start, (queries, keys, units, *others))  # l b k g j
    return jnp.moveaxis(rows, 0, 3).reshape(batch, q.shape[2], length, length) * dh**-0.5
