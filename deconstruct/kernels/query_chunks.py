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
from deconstruct.kernels.kv_cache import KVCache

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


def mix(q: jax.Array, k: jax.Array, v: jax.Array, weighing: Weighing, chunk: int | None = None) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv]: [Bv, L, H, dv].

    Where Bq = 1 < Bv, a chunk's map is formed once and applied to all rows. Matmul inputs keep their dtype.
    """
    length = q.shape[1]
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
        part = queries[..., first:last, :]
        program: Callable[..., jax.Array] = functools.partial(_mix_chunk, weighing, last - first, first)
        if length > KEEP_LENGTH:
            program = jax.checkpoint(program)
        flat = part.reshape(*part.shape[:2], -1, part.shape[-1])
        out = program(flat, keys[:, :, :last], values[:, :, :last])
        parts.append(out.reshape(*part.shape[:4], *rows_and_dim))
    return grouped.merge_results(jnp.concatenate(parts, axis=3))


def mix_last(q: jax.Array, cache: KVCache, batch: int, weighing: Weighing, chunk: int | None = None) -> jax.Array:
    """The last C positions that a cache holds, q [Bq, C, H, dh], over all of them: [Bv, C, H, dv]. `batch` is Bv.

    What the cache has beyond its length is not read, but must be finite. No gradients are provided for.
    """
    qk_batch, length, heads, dh = q.shape
    rows, room = cache.k.shape[:2]
    chunk = chunk or default_chunk(length)
    groups = heads * qk_batch // rows
    queries = grouped.split_queries(q, rows // qk_batch).reshape(rows, groups, length, dh)
    start = cache.length - length
    parts = []
    for first in range(0, length, chunk):
        part = queries[:, :, first : first + chunk]
        positions = part.shape[2]
        mask = jnp.tile(grouped.causal_mask(positions, room, start + first), (groups, 1))
        x = grouped.contract("zrd,zsd->zrs", part.reshape(rows, -1, dh), cache.k) * dh**-0.5
        weights = weighing.weights(weighing.slope(x, mask), mask)
        out = grouped.contract("zrs,zsw->zrw", weights.astype(cache.v.dtype), cache.v)
        out = (out / weights.sum(-1, keepdims=True)).astype(cache.v.dtype)
        parts.append(out.reshape(qk_batch, rows // qk_batch, groups, positions, batch // qk_batch, -1))
    return grouped.merge_results(jnp.concatenate(parts, axis=3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mix_chunk(weighing: Weighing, positions: int, start: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [b, K, r, dh], k [b, K, S, dh], v [b, K, S, w] -> [b, K, r, w]; row r is position start + r % positions."""
    return _forward(weighing, positions, start, q, k, v)[0]


def _mask(positions: int, start: int, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.tile(grouped.causal_mask(positions, k.shape[2], start), (q.shape[2] // positions, 1))


def _forward(
    weighing: Weighing, positions: int, start: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mask = _mask(positions, start, q, k)
    slope = weighing.slope(grouped.contract("bkrd,bksd->bkrs", q, k) * q.shape[-1] ** -0.5, mask)
    weights = weighing.weights(slope, mask)
    sums = weights.sum(-1, keepdims=True)
    out = (grouped.contract("bkrs,bksw->bkrw", weights.astype(v.dtype), v) / sums).astype(v.dtype)
    return out, (q, k, v, slope.astype(q.dtype), sums, out)


def _backward(
    weighing: Weighing, positions: int, start: int, saved: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, slope, sums, out = saved
    per_sum = g.astype(sums.dtype) / sums
    mean = (per_sum * out).sum(-1, keepdims=True)
    per_sum = per_sum.astype(v.dtype)
    weights = weighing.weights(slope, _mask(positions, start, q, k)).astype(v.dtype)
    dv = grouped.contract("bkrs,bkrw->bksw", weights, per_sum)
    dx = (slope * (grouped.contract("bkrw,bksw->bkrs", per_sum, v) - mean)).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    dq = grouped.contract("bkrs,bksd->bkrd", dx, k) * scale
    dk = grouped.contract("bkrs,bkrd->bksd", dx, q) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_mix_chunk.defvjp(_forward, _backward)
