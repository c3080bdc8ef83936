"""Gated linear attention as a walk over chunks: S_t = diag(a_t) S_{t-1} + k_t v_t^T, out_t = q_t S_t / sqrt(dh).

The recurrence of `kernels.gated_linear`, with S on the chip. Within a chunk each level of blocks is one product of
which the pairs of that level are taken, so that every exponent is at most zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import recurrent_chunks
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.tpu import chunks
from deconstruct.kernels.tpu.chunks import dot
from deconstruct.kernels.tpu.walk import walk

CHUNK = 128


class _Chunk(NamedTuple):
    q: jax.Array  # [dh, G C]
    k: jax.Array  # [dh, C]
    v: jax.Array  # [w, C]
    log_decay: jax.Array  # float32 [dh, C]


def gated_linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, mask: Mask = CAUSAL, chunk: int = CHUNK
) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv], log_decay [Bq, L, K, dh] (at most zero) -> [Bv, L, H, dv]
    in v's dtype; Bq is Bv or 1. `mask` may have documents, then Bq is Bv; ValueError for a window. Any L. `chunk`: a
    power of two. Decays and the state are float32.
    """
    batch, _, heads, dh = q.shape
    kv_heads, rows = k.shape[2], batch * k.shape[2]
    log_decay = recurrent_chunks.with_borders(log_decay.astype(jnp.float32), mask, batch, v.shape[0])
    state = jnp.zeros((rows, dh, v.shape[0] // batch * v.shape[3]), jnp.float32)
    pieces = _Chunk(
        chunks.cut_queries(q, kv_heads, chunk),
        chunks.cut_keys(k, chunk),
        chunks.cut_values(v, batch, chunk),
        chunks.cut_keys(log_decay, chunk),
    )
    _, out = walk(_step, state, pieces)
    return chunks.join_results(out, v, heads, batch)


def _step(s: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
    """S [dh, w] after a chunk, and what its queries read [w, G C]."""
    q, k, v, log_decay = chunk
    dh, size = k.shape
    groups = q.shape[1] // size

    def decays(level: chunks.Level) -> tuple[jax.Array, jax.Array]:
        return jnp.exp(dot(log_decay, level.into, 1, 0)), jnp.exp(dot(log_decay, level.out, 1, 0))

    # A position has itself whole.
    weights = jnp.where(
        chunks.repeat(chunks.itself(size), groups),
        (q.astype(jnp.float32) * chunks.repeat(k, groups).astype(jnp.float32)).sum(0, keepdims=True),
        0.0,
    )
    for level in chunks.levels(size):
        into, out = decays(level)
        product = dot((k * out).astype(k.dtype), (q * chunks.repeat(into, groups)).astype(q.dtype), 0, 0)
        weights = jnp.where(chunks.repeat(level.pairs, groups), product, weights)
    into, out = decays(chunks.of_the_chunk(size))
    read = dot(v, weights.astype(v.dtype), 1, 0)
    read += dot(s.astype(q.dtype), (q * chunks.repeat(into, groups)).astype(q.dtype), 0, 0)
    s = into[:, -1:] * s + dot((k * out).astype(k.dtype), v, 1, 1)
    return s, (read * dh**-0.5).astype(v.dtype)
