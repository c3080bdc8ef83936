"""The definitions of the forms as dense maps: what every fast path is tested against.

Each `*_weights(q, k)` takes q [Bq, L, H, dh] and k [Bq, L, K, dh] and returns A [Bq, H, L, L] in float32 (float64 for
float64 inputs): zero above the diagonal, each row sums to one. Positions count from one in the equations, so row i has
i entries. The logits are x_ij = q_i . k_j / sqrt(dh); the scale is applied here and nowhere else.

Where a mask is taken, sums over m <= i are over what position i sees: its own document, and no more than the window. A
mask with documents has the batch of q.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped
from deconstruct.kernels.mask import CAUSAL, Mask

# Order 1 of taylor_diagonal may not have a mean logit nearer to zero than this; order 2 (squares) than its square.
GUARD = 1e-2


def logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """x = q . k / sqrt(dh) for every pair, unmasked: [Bq, H, L, S], float32 (or float64)."""
    queries = grouped.split_queries(q, k.shape[2])
    x = grouped.exactly("bkgld,bksd->bkgls", queries, grouped.split_keys(k)) * q.shape[-1] ** -0.5
    return x.reshape(x.shape[0], q.shape[2], *x.shape[3:])


def softmax_weights(q: jax.Array, k: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    """A_ij = exp(x_ij) / sum_{m<=i} exp(x_im)."""
    x = logits(q, k)
    return jax.nn.softmax(jnp.where(_seen(mask, q), x, -jnp.inf), axis=-1)


def taylor_weights(q: jax.Array, k: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    """A_ij = T(x_ij) / sum_{m<=i} T(x_im) with T(x) = 1 + x + x^2 / 2, which is at least 1/2 (Based, Arora 2024)."""
    x = logits(q, k)
    weights = jnp.where(_seen(mask, q), 1 + x + x * x / 2, 0)
    return weights / weights.sum(-1, keepdims=True)


def taylor_diagonal_weights(q: jax.Array, k: jax.Array, jointly: bool = False) -> jax.Array:
    """The mean of three maps, one for each order of Taylor's series, each normalised by itself.

        order 0:  1 / i
        order 1:  x_ij / sum_m x_im
        order 2:  y_ij / sum_m y_im,    y_ij = sum_c q_ic^2 k_jc^2 / dh     (only the element-wise squares are kept)

    Equations 14-17 of arXiv:2510.11602, divided by three: the paper adds the orders, and its rows sum to three.
    It does not say what becomes of a sum that vanishes; the guard is our decision. A total too near zero is moved away
    from it by `guard`, and what is added to it is given to the i entries in equal parts, so that the row still sums
    to one. `jointly`: (1 + x + y / 2) over the one sum of that, guarded likewise.
    """
    x = logits(q, k)
    dtype = x.dtype
    y = logits(jnp.square(q.astype(dtype)), jnp.square(k.astype(dtype))) * q.shape[-1] ** -0.5
    mask = grouped.causal_mask(*x.shape[-2:])
    count = jnp.arange(1, x.shape[-2] + 1, dtype=dtype)[None, None, :, None]
    total, orders = jnp.where(mask, 1 / count, 0), [(x, GUARD), (y, GUARD**2)]
    if jointly:
        total, orders = jnp.zeros((), dtype), [(1 + x + y / 2, GUARD)]
    for weights, least in orders:
        kept = jnp.where(mask, weights, 0)
        sums = kept.sum(-1, keepdims=True)
        delta = guard(sums, count, least)
        total += jnp.where(mask, kept + delta / count, 0) / (sums + delta)
    return total if jointly else total / 3


def guard(sums: jax.Array, count: jax.Array, least: float) -> jax.Array:
    """The delta for which |sums + delta| >= least * count, without a change of sign; zero where that holds already.

    A sum of exactly zero counts as positive. The output jumps where a sum passes through zero: the form is like that.
    """
    bound = least * count
    signed = jnp.where(sums < 0, -bound, bound)
    return jnp.where(jnp.abs(sums) < bound, signed - sums, 0)


def gate_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """s_j = silu(q_j) . k_j / sqrt(dh), one scalar for each position and query head: [Bq, H, L], float32 (or 64)."""
    dtype = grouped.accumulation_dtype(q, k)
    batch, length, heads, dim = q.shape
    queries = grouped.split_queries(q, k.shape[2]).astype(dtype)
    keys = grouped.split_keys(k).astype(dtype)[:, :, None]
    return (jax.nn.silu(queries) * keys).sum(-1).reshape(batch, heads, length) * dim**-0.5


def self_gate_weights(q: jax.Array, k: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    """A_ij = exp(s_j) / sum_{m<=i} exp(s_m), with s_j = silu(q_j) . k_j / sqrt(dh).

    The scores may pass 1e3 (arXiv:2510.11602, section on logit outliers), so each row subtracts the maximum of what it
    sees itself (as `softmax` does): under one global maximum the early rows would be 0 / 0.
    """
    s = gate_scores(q, k)
    return jax.nn.softmax(jnp.where(_seen(mask, q), s[..., None, :], -jnp.inf), axis=-1)


def _seen(mask: Mask, q: jax.Array) -> jax.Array:
    """bool [Bq or 1, 1, L, L]."""
    mask.begins_of(q)
    return mask.dense(q.shape[1], q.shape[1])


def apply_weights(weights: jax.Array, v: jax.Array) -> jax.Array:
    """sum_j A_ij v_j: weights [Bq, H, L, S] and v [Bv, S, K, dv] give [Bv, L, H, dv] in v's dtype.

    The map keeps the batch it has: with Bq = 1 one matmul serves all rows of v.
    """
    batch, heads, length, size = weights.shape
    kv_heads = v.shape[2]
    maps = weights.reshape(batch, kv_heads, heads // kv_heads, length, size)
    out = grouped.exactly("bkgls,bksne->bkglne", maps, grouped.split_values(v, batch))
    return grouped.merge_results(out).astype(v.dtype)
