"""Causal mixing by a map of pairwise logits, one chunk of queries after the other.

    out_i = sum_{j<=i} w(x_ij) v_j / sum_{j<=i} w(x_ij),    x_ij = q_i . k_j / sqrt(dh)

The chunks are a static Python loop: the chunk that ends at position e reads the keys before e only, so nearly half of
the L x L work is never done, and what is held at one time is a chunk's map, not the whole. Under a mask the sums are
over what position i sees; with a window the chunk that starts at position f reads no key before f - window + 1, so that
time and memory are those of L x (chunk + window). Documents are masked within the chunks, and save nothing.

The backward pass is written by hand (so: no forward-mode derivatives). With n = sum_j w_ij and u = dw/dx,

    dL/dx_ij = u_ij (g_i . v_j - g_i . out_i) / n_i

which needs one array over the pairs where automatic differentiation keeps several. That array is u, from which a form
gives back its w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped
from deconstruct.kernels.kv_cache import KVCache
from deconstruct.kernels.mask import CAUSAL, Mask

# Up to this length a chunk's map is kept for the backward pass (half of L x L, in the input dtype); above it, the map
# is formed again: one matmul more, and memory no longer grows with the square of the length.
KEEP_LENGTH = 2048


class Weighing(NamedTuple):
    """How a form weighs: `slope(x, mask)` is u = dw/dx, zero where masked; `weights(u, mask)` gives w from it."""

    slope: Callable[[jax.Array, jax.Array], jax.Array]
    weights: Callable[[jax.Array, jax.Array], jax.Array]


def default_chunk(length: int, window: int | None = None) -> int:
    """Eight chunks a sequence, but none below 128 (small matmuls are slow) nor above 1024 (its map would be large).

    Nor above a window, where that is 128 or more: a chunk reads chunk + window - 1 keys, and each query sees `window`
    of them, so that at most half of the cells are in vain. But 64 chunks at most: each is compiled by itself.
    """
    chunk = min(max(128, -(-length // 8)), 1024)
    return chunk if window is None else min(chunk, max(128, window, -(-length // 64)))


def mix(
    q: jax.Array, k: jax.Array, v: jax.Array, weighing: Weighing, chunk: int | None = None, mask: Mask = CAUSAL
) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, S, K, dh], v [Bv, S, K, dv]: [Bv, L, H, dv].

    S is L, or more: the queries are those of the last L positions, and `mask` counts from the first of these. Where
    Bq = 1 < Bv, a chunk's map is formed once and applied to all rows. Matmul inputs keep their dtype. ValueError where
    the mask's documents are not of shape [Bq, L].
    """
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    begins, window = mask.begins_of(q), mask.window
    chunk = chunk or default_chunk(length, window)
    reach = past + length if window is None else min(past + length, window + chunk)
    queries, keys = grouped.split_queries(q, k.shape[2]), grouped.split_keys(k)
    values = grouped.split_values(v, q.shape[0])
    rows_and_dim = values.shape[3:]
    # Two batch axes and two matrix axes in each matmul (r = groups x positions, w = rows x dv): XLA's CPU backend is
    # nearly twice as fast on these as on the same products with the axes kept apart.
    values = values.reshape(*values.shape[:3], -1)
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        low = 0 if window is None else max(0, past + first - window + 1)  # the first key that any of the chunk sees
        here = slice(low, past + last)
        part = queries[..., first:last, :]
        program: Callable[..., jax.Array] = functools.partial(
            _mix_chunk, weighing, last - first, past + first - low, window
        )
        if length * reach > KEEP_LENGTH**2:
            program = jax.checkpoint(program)
        flat = part.reshape(*part.shape[:2], -1, part.shape[-1])
        borders = None if begins is None else begins[:, first:last] - first
        out = program(flat, keys[:, :, here], values[:, :, here], borders)
        parts.append(out.reshape(*part.shape[:4], *rows_and_dim))
    return grouped.merge_results(jnp.concatenate(parts, axis=3))


def mix_last(
    q: jax.Array, cache: KVCache, batch: int, weighing: Weighing, chunk: int | None = None, mask: Mask = CAUSAL
) -> jax.Array:
    """The last C positions that a cache holds, q [Bq, C, H, dh], over all of them: [Bv, C, H, dv]. `batch` is Bv.

    `mask` counts from the first of the C positions. What the cache has beyond its length is not read, but must be
    finite. No gradients are provided for.
    """
    length, room = q.shape[1], cache.k.shape[1]
    begins = mask.begins_of(q)
    chunk = chunk or default_chunk(length)
    start = cache.length - length
    parts = []
    for first in range(0, length, chunk):
        part = q[:, first : first + chunk]
        borders = None if begins is None else begins[:, first : first + chunk] - first
        seen = mask.dense(part.shape[1], room, start + first, begins=borders)
        parts.append(read(part, cache.k, cache.v, seen, batch, weighing))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def read(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, batch: int, weighing: Weighing) -> jax.Array:
    """Queries [Bq, C, H, dh] over keys [Bq K, S, dh] and values [Bq K, S, w] as they lie in a cache: [Bv, C, H, dv].

    `seen` is bool [Bq or 1, 1, C, S], `batch` is Bv. What is not seen must be finite.
    """
    qk_batch, length, heads, dh = q.shape
    rows, room = k.shape[:2]
    kv_heads = rows // qk_batch
    groups = heads // kv_heads
    queries = grouped.split_queries(q, kv_heads).reshape(rows, groups * length, dh)
    if seen.shape[0] == 1:
        mask = jnp.tile(seen[0, 0], (groups, 1))
    else:
        shape = (qk_batch, kv_heads, groups, length, room)
        mask = jnp.broadcast_to(seen[:, :, None], shape).reshape(rows, groups * length, room)
    x = grouped.contract("zrd,zsd->zrs", queries, k) * dh**-0.5
    weights = weighing.weights(weighing.slope(x, mask), mask)
    out = grouped.contract("zrs,zsw->zrw", weights.astype(v.dtype), v)
    out = (out / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return grouped.merge_results(out.reshape(qk_batch, kv_heads, groups, length, batch // qk_batch, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _mix_chunk(
    weighing: Weighing,
    positions: int,
    start: int,
    window: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    begins: jax.Array | None,
) -> jax.Array:
    """q [b, K, r, dh], k [b, K, S, dh], v [b, K, S, w] -> [b, K, r, w]; row r is position start + r % positions.

    `begins` [b, positions] is counted from the first of the positions.
    """
    return _forward(weighing, positions, start, window, q, k, v, begins)[0]


def _mask(
    positions: int, start: int, window: int | None, q: jax.Array, k: jax.Array, begins: jax.Array | None
) -> jax.Array:
    """bool [r, S], or [b, 1, r, S] with documents."""
    mask, groups = Mask(window=window), q.shape[2] // positions
    if begins is None:
        return jnp.tile(mask.band(positions, k.shape[2], start), (groups, 1))
    return jnp.tile(mask.dense(positions, k.shape[2], start, begins=begins), (1, 1, groups, 1))


def _forward(
    weighing: Weighing,
    positions: int,
    start: int,
    window: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    begins: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    mask = _mask(positions, start, window, q, k, begins)
    slope = weighing.slope(grouped.contract("bkrd,bksd->bkrs", q, k) * q.shape[-1] ** -0.5, mask)
    weights = weighing.weights(slope, mask)
    sums = weights.sum(-1, keepdims=True)
    out = (grouped.contract("bkrs,bksw->bkrw", weights.astype(v.dtype), v) / sums).astype(v.dtype)
    return out, (q, k, v, begins, slope.astype(q.dtype), sums, out)


def _backward(
    weighing: Weighing, positions: int, start: int, window: int | None, saved: tuple[Any, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, begins, slope, sums, out = saved
    per_sum = g.astype(sums.dtype) / sums
    mean = (per_sum * out).sum(-1, keepdims=True)
    per_sum = per_sum.astype(v.dtype)
    weights = weighing.weights(slope, _mask(positions, start, window, q, k, begins)).astype(v.dtype)
    dv = grouped.contract("bkrs,bkrw->bksw", weights, per_sum)
    dx = (slope * (grouped.contract("bkrw,bksw->bkrs", per_sum, v) - mean)).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    dq = grouped.contract("bkrs,bksd->bkrd", dx, k) * scale
    dk = grouped.contract("bkrs,bkrd->bksd", dx, q) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_mix_chunk.defvjp(_forward, _backward)
