"""Second-order Taylor attention in time linear in L, as a walk over chunks with the sums over the past on the chip.

The recurrence of `kernels.taylor.taylor_chunked`, positions along the lanes: the map within a chunk, and for what came
before it the sums 1, k, k k^T, v, k v and pairs(k) v, where `pairs` takes each of the dh (dh + 1) / 2 products once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.taylor import chunked_is_cheaper, pair_count
from deconstruct.kernels.tpu import chunks, pairwise
from deconstruct.kernels.tpu.chunks import Chunk, dot
from deconstruct.kernels.tpu.walk import walk

CHUNK, SHORT_CHUNK = 256, 128
# Bytes of the state's second order (counted as two numbers of the inputs' dtype: in bfloat16 float32, in float32 twice,
# as products take it whole), and of the products of a chunk's queries. The backward pass holds each several times; with
# this it compiles for the 64 MiB of v5p and tpu7x.
MOST = 5 * 2**20


class _State(NamedTuple):
    """Of one row, float32, as `kernels.taylor.TaylorState` but for the order of the axes."""

    n0: jax.Array  # [1, 1]
    n1: jax.Array  # [1, dh]
    n2: jax.Array  # [dh, dh]
    s0: jax.Array  # [w, 1]
    s1: jax.Array  # [w, dh]
    s2: jax.Array  # [w, pairs]


def taylor_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    """Second-order Taylor attention of a whole sequence, by whichever kernel counts fewer FLOPs at this length.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. Under a
    window the map by blocks is the one there is, and so where the chip has no room for the sums over the past (wide
    heads; many sequences that share a map; float32 with grouped queries).
    """
    groups, rows = q.shape[2] // k.shape[2], v.shape[0] // q.shape[0]
    chunk = fitting_chunk(q.shape[-1], rows * v.shape[-1], groups, q.dtype.itemsize)
    sizes = q.shape[1], q.shape[-1], v.shape[-1], groups, rows
    if mask.window is None and chunk is not None and chunked_is_cheaper(*sizes, chunk, pairwise.BLOCK):
        return taylor_chunked(q, k, v, mask, chunk)
    return pairwise.taylor_attention(q, k, v, mask)


def fitting_chunk(dh: int, width: int, groups: int, itemsize: int) -> int | None:
    """The positions that a walk may take at a time; None where the chip has no room for it at all. `itemsize`: bytes of
    a number of the inputs."""
    if 2 * pair_count(dh) * width * itemsize > MOST:
        return None
    fit = (chunk for chunk in (CHUNK, SHORT_CHUNK) if pair_count(dh) * groups * chunk * itemsize <= MOST)
    return next(fit, None)


def taylor_chunked(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, chunk: int = CHUNK) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype; Bq is Bv or 1.

    `mask` may have documents, begins [Bq, L]; ValueError for a window. Products take the inputs' dtype; sums, states
    and normalisers are float32. Any L.
    """
    mask.refuse_window("taylor_chunked")
    batch, _, heads, dh = q.shape
    rows = batch * k.shape[2]
    width = v.shape[0] // batch * v.shape[3]
    state = _State(
        *(
            jnp.zeros((rows, *shape), jnp.float32)
            for shape in ((1, 1), (1, dh), (dh, dh), (width, 1), (width, dh), (width, pair_count(dh)))
        )
    )
    _, out = walk(_step, state, chunks.cut(q, k, v, mask, chunk))
    return chunks.join_results(out, v, heads, batch)


def _step(state: _State, chunk: Chunk) -> tuple[_State, jax.Array]:
    q, k, v, begins = chunk
    size = k.shape[1]
    groups, scale = q.shape[1] // size, q.shape[0] ** -0.5
    seen = chunks.causal(size)
    if begins is not None:
        seen &= jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) >= begins
    slope = 1 + dot(k, q, 0, 0) * scale
    weights = jnp.where(chunks.repeat(seen, groups), (slope * slope + 1) * 0.5, 0.0)
    numerator, sums = _read(state, q, scale)
    if begins is not None:
        # Selected, not multiplied by zero: another document's sums may be of any size.
        goes_on = chunks.repeat(begins, groups) < 0
        numerator, sums = jnp.where(goes_on, numerator, 0.0), jnp.where(goes_on, sums, 0.0)
        last = begins[:, -1:]
        state = _State(*(jnp.where(last < 0, x, 0.0) for x in state))
        kept = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) >= last
        k, v = (jnp.where(kept, x, jnp.zeros_like(x)) for x in (k, v))
        count = kept.astype(jnp.float32).sum(1, keepdims=True)
    else:
        count = jnp.full((1, 1), size, jnp.float32)
    numerator += dot(chunk.v, weights.astype(v.dtype), 1, 0)
    sums += weights.sum(0, keepdims=True)
    return _add(state, k, v, count), (numerator / sums).astype(v.dtype)


def _read(state: _State, q: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """What the state gives to queries [dh, r]: numerators [w, r] and normalisers [1, r], float32."""
    numerator = state.s0 + dot(state.s1.astype(q.dtype), q, 1, 0) * scale
    numerator += dot(state.s2.astype(q.dtype), _pairs(q, counted=True), 1, 0) * (scale**2 / 2)
    # The three orders may cancel in part (only their sum is positive): float32 from the inputs on.
    exact = q.astype(jnp.float32)
    sums = state.n0 + dot(state.n1, exact, 1, 0) * scale
    return numerator, sums + (dot(state.n2, exact, 1, 0) * exact).sum(0, keepdims=True) * (scale**2 / 2)


def _add(state: _State, k: jax.Array, v: jax.Array, count: jax.Array) -> _State:
    exact = k.astype(jnp.float32)
    ones = jnp.ones((1, k.shape[1]), jnp.float32)
    return _State(
        n0=state.n0 + count,
        n1=state.n1 + dot(ones, exact, 1, 1),
        n2=state.n2 + dot(exact, exact, 1, 1),
        s0=state.s0 + v.astype(jnp.float32).sum(1, keepdims=True),
        s1=state.s1 + dot(v, k, 1, 1),
        s2=state.s2 + dot(v, _pairs(k), 1, 1),
    )


def _pairs(x: jax.Array, counted: bool = False) -> jax.Array:
    """[dh, r] -> [pairs, r], as `kernels.taylor._pairs`."""
    dh = x.shape[0]
    times = np.full(dh // 2 + 1, 2.0)
    times[0] = 1
    if dh % 2 == 0:
        times[-1] = 1
    twice = jnp.concatenate([x, x], axis=0)
    return jnp.concatenate([(x * float(n) if counted else x) * twice[r : r + dh] for r, n in enumerate(times)], axis=0)
