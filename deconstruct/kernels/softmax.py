"""Softmax attention in plain XLA, fit to train with: A_ij = exp(x_ij) / sum_{m<=i} exp(x_im), x = q . k / sqrt(dh)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import query_chunks
from deconstruct.kernels.kv_cache import KVCache
from deconstruct.kernels.mask import CAUSAL, Mask


def _slope(x: jax.Array, mask: jax.Array) -> jax.Array:
    # Relative to the row's maximum, exp is its own slope, and the common factor cancels in the quotient.
    x = jnp.where(mask, x, -jnp.inf)
    return jnp.exp(x - x.max(-1, keepdims=True))


def _weights(slope: jax.Array, mask: jax.Array) -> jax.Array:
    del mask
    return slope


SOFTMAX = query_chunks.Weighing(_slope, _weights)


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk: int | None = None, mask: Mask = CAUSAL
) -> jax.Array:
    """Causal softmax attention of a whole sequence.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. The softmax
    is float32. 2 L^2 H (dh + dv) FLOPs, nearly half of them skipped. With a window, no more than the keys within
    reach are read: 2 L (window + chunk) H (dh + dv). `chunk` queries are taken at a time. ValueError where heads,
    batches or the mask do not fit together.
    """
    return query_chunks.mix(q, k, v, SOFTMAX, chunk, mask)


def softmax_last(q: jax.Array, cache: KVCache, batch: int, chunk: int | None = None, mask: Mask = CAUSAL) -> jax.Array:
    """Softmax attention of the last C positions in a cache over all of them, q [Bq, C, H, dh]: [Bv, C, H, dv].

    `batch` is Bv; `mask` counts from the first of the C positions. What the cache has beyond its length is not read,
    but must be finite.
    """
    return query_chunks.mix_last(q, cache, batch, SOFTMAX, chunk, mask)
