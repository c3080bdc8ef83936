"""Causal mixing by a map of pairwise logits, one chunk of queries after the other.

    out_i = sum_{j<=i} w(x_ij) v_j / sum_{j<=i} w(x_ij),    x_ij = q_i . k_j / sqrt(dh)

The chunks are a static Python loop: the chunk that ends at position e reads the keys before e only, so nearly half of
the L x L work is never done, and what is held at one time is a chunk's map, not the whole.

The backward pass is written by hand (so: no forward-mode derivatives). With n = sum_j w_ij and u = dw/dx,

    dL/dx_ij = u_ij (g_i . v_j - g_i . out_i) / n_i

which needs one array over the pairs where automatic differentiation keeps several. That array is u, from which a form
gives back its w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped

# Up to this length a chunk's map is kept for the backward pass (half of L x L, in the input dtype); above it, the map
# is formed again: one matmul more, and memory no longer grows with the square of the length.
KEEP_LENGTH = 2048


class Weighing(NamedTuple):
    """How a form weighs: `slope(x, mask)` is u = dw/dx, zero where masked; `weights(u, mask)` gives w from it."""

    slope: Callable[[jax.Array, jax.Array], jax.Array]
    weights: Callable[[jax.Array, jax.Array], jax.Array]


def default_chunk(length: int) -> int:
    """Eight chunks a sequence, but none below 128 (small matmuls are slow) nor above 1024 (its map would be large)."""
    return min(max(128, -(-length // 8)), 1024)


def mix(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weighing: Weighing,
    chunk: int | None = None,
    offset: int | jax.Array = 0,
) -> jax.Array:
    """q [Bq, C, H, dh] at positions offset..offset+C over k [Bq, S, K, dh], v [Bv, S, K, dv]: [Bv, C, H, dv].

    `offset` may be traced; keys that no query of a chunk can see are skipped only where it is a Python integer.
    Where Bq = 1 < Bv, a chunk's map is formed once and applied to all rows. Matmul inputs keep their dtype.
    """
    length, size = q.shape[1], k.shape[1]
    chunk = chunk or default_chunk(length)
    queries, keys = grouped.split_queries(q, k.shape[2]), grouped.split_keys(k)
    values = grouped.split_values(v, q.shape[0])
    rows_and_dim = values.shape[3:]
    # Two batch axes and two matrix axes in each matmul (r = groups x positions, w = rows x dv): XLA's CPU backend is
    # nearly twice as fast on these as on the same products with the axes kept apart.
    values = values.reshape(*values.shape[:3], -1)
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        seen = min(offset + last, size) if isinstance(offset, int) else size
        start = jnp.asarray(offset + first, jnp.int32)
        part = queries[..., first:last, :]
        program: Callable[..., jax.Array] = functools.partial(_mix_chunk, weighing, last - first)
        if length > KEEP_LENGTH:
            program = jax.checkpoint(program)
        flat = part.reshape(*part.shape[:2], -1, part.shape[-1])
        out = program(flat, keys[:, :, :seen], values[:, :, :seen], start)
        parts.append(out.reshape(*part.shape[:4], *rows_and_dim))
    return grouped.merge_results(jnp.concatenate(parts, axis=3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mix_chunk(
    weighing: Weighing, positions: int, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array
) -> jax.Array:
    """q [b, K, r, dh], k [b, K, S, dh], v [b, K, S, w] -> [b, K, r, w]; row r is position start + r % positions."""
    return _forward(weighing, positions, q, k, v, start)[0]


def _mask(positions: int, q: jax.Array, k: jax.Array, start: jax.Array) -> jax.Array:
    return jnp.tile(grouped.causal_mask(positions, k.shape[2], start), (q.shape[2] // positions, 1))


def _forward(
    weighing: Weighing, positions: int, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mask = _mask(positions, q, k, start)
    slope = weighing.slope(grouped.contract("bkrd,bksd->bkrs", q, k) * q.shape[-1] ** -0.5, mask)
    weights = weighing.weights(slope, mask)
    sums = weights.sum(-1, keepdims=True)
    out = (grouped.contract("bkrs,bksw->bkrw", weights.astype(v.dtype), v) / sums).astype(v.dtype)
    return out, (q, k, v, start, slope.astype(q.dtype), sums, out)


def _backward(
    weighing: Weighing, positions: int, saved: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, start, slope, sums, out = saved
    per_sum = g.astype(sums.dtype) / sums
    mean = (per_sum * out).sum(-1, keepdims=True)
    per_sum = per_sum.astype(v.dtype)
    weights = weighing.weights(slope, _mask(positions, q, k, start)).astype(v.dtype)
    dv = grouped.contract("bkrs,bkrw->bksw", weights, per_sum)
    dx = (slope * (grouped.contract("bkrw,bksw->bkrs", per_sum, v) - mean)).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    dq = grouped.contract("bkrs,bksd->bkrd", dx, k) * scale
    dk = grouped.contract("bkrs,bkrd->bksd", dx, q) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_mix_chunk.defvjp(_forward, _backward)
