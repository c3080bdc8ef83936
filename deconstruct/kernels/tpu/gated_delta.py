"""The gated delta rule as a walk over chunks, with the memory S on the chip.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    out_t = q_t S_t / sqrt(dh)

The recurrence and the WY form of `kernels.gated_delta`. The unit triangle of a chunk is inverted by its blocks, of one
position, of two, of four: a product of whole matrices for all blocks of a size, where only the corners are not zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import recurrences, recurrent_chunks
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.tpu import chunks
from deconstruct.kernels.tpu.chunks import dot
from deconstruct.kernels.tpu.walk import walk

CHUNK = 64


class _Chunk(NamedTuple):
    q: jax.Array  # [dh, G C], of unit length
    k: jax.Array  # [dh, C], of unit length
    v: jax.Array  # [w, C]
    log_decay: jax.Array  # float32 [1, C]
    beta: jax.Array  # float32 [1, C]


def gated_delta_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array,
    beta: jax.Array,
    mask: Mask = CAUSAL,
    chunk: int = CHUNK,
) -> jax.Array:
    """q [Bq, L, H, dh] and k [Bq, L, K, dh] of any length, v [Bv, L, K, dv], log_decay [Bq, L, K] (at most zero), beta
    [Bq, L, K] in [0, 1] -> [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. `mask` may have documents, then Bq is Bv;
    ValueError for a window. Any L. `chunk`: a power of two. Decays, the inverse and the state are float32.
    """
    batch, _, heads, dh = q.shape
    kv_heads, rows = k.shape[2], batch * k.shape[2]
    log_decay = recurrent_chunks.with_borders(log_decay.astype(jnp.float32), mask, batch, v.shape[0])
    state = jnp.zeros((rows, dh, v.shape[0] // batch * v.shape[3]), jnp.float32)
    pieces = _Chunk(
        chunks.cut_queries(recurrences.unit(q).astype(q.dtype), kv_heads, chunk),
        chunks.cut_keys(recurrences.unit(k).astype(k.dtype), chunk),
        chunks.cut_values(v, batch, chunk),
        chunks.cut_keys(log_decay[..., None], chunk),
        chunks.cut_keys(beta.astype(jnp.float32)[..., None], chunk),
    )
    _, out = walk(_step, state, pieces)
    return chunks.join_results(out, v, heads, batch)


def _step(s: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
    """S [dh, w] after a chunk, and what its queries read [w, G C]."""
    q, k, v, log_decay, beta = chunk
    dh, size = k.shape
    groups = q.shape[1] // size
    chunk_level = chunks.of_the_chunk(size)
    into = jnp.exp(dot(log_decay, chunk_level.into, 1, 0))  # [1, queries]
    out = jnp.exp(dot(log_decay, chunk_level.out, 1, 0))  # [1, keys]
    between = _between(log_decay, size)
    missing = v.astype(jnp.float32) - into * dot(s.astype(k.dtype), k, 0, 0)
    above = jnp.where(chunks.causal(size) & ~chunks.itself(size), dot(k, k, 0, 0) * between * beta, 0.0)
    inverse = _inverse(above)
    written = dot((beta * missing).astype(v.dtype), inverse.astype(v.dtype), 1, 0).astype(v.dtype)  # [w, C]
    weights = dot(k, q, 0, 0) * chunks.repeat(between, groups)
    read = dot(written, weights.astype(v.dtype), 1, 0)
    read += chunks.repeat(into, groups) * dot(s.astype(q.dtype), q, 0, 0)
    s = into[:, -1:] * s + dot((k * out).astype(k.dtype), written, 1, 1)
    return s, (read * dh**-0.5).astype(v.dtype)


def _between(log_decay: jax.Array, size: int) -> jax.Array:
    """What a query still has of a key, [keys, queries]: one for the position itself, zero for what comes later."""
    between = chunks.itself(size).astype(jnp.float32)
    for level in chunks.levels(size):
        into = jnp.exp(dot(log_decay, level.into, 1, 0))  # [1, queries]
        out = jnp.exp(dot(level.out, log_decay, 0, 1))  # [keys, 1]
        between = jnp.where(level.pairs, out * into, between)
    return between


def _inverse(above: jax.Array) -> jax.Array:
    """(I + N)^-1 of a strictly upper triangle N, float32. Of two neighbouring blocks inverted by themselves, X and Y,
    the corner is -X N Y."""
    size = above.shape[0]
    inverse = chunks.itself(size).astype(jnp.float32)
    for level in chunks.levels(size):
        corners = jnp.where(level.pairs, above, 0.0)
        inverse -= dot(inverse, dot(corners, inverse, 1, 0), 1, 0)
    return inverse
