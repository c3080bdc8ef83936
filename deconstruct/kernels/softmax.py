"""Softmax attention in plain XLA, fit to train with: A_ij = exp(x_ij) / sum_{m<=i} exp(x_im), x = q . k / sqrt(dh)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import query_chunks


def _slope(x: jax.Array, mask: jax.Array) -> jax.Array:
    # Relative to the row's maximum, exp is its own slope, and the common factor cancels in the quotient.
    x = jnp.where(mask, x, -jnp.inf)
    return jnp.exp(x - x.max(-1, keepdims=True))


def _weights(slope: jax.Array, mask: jax.Array) -> jax.Array:
    del mask
    return slope


_SOFTMAX = query_chunks.Weighing(_slope, _weights)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int | None = None) -> jax.Array:
    """Causal softmax attention of a whole sequence.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. The softmax
    is float32. 2 L^2 H (dh + dv) FLOPs, nearly half of them skipped. `chunk` queries are taken at a time. ValueError
    where heads or batches do not fit together.
    """
    return query_chunks.mix(q, k, v, _SOFTMAX, chunk)


def softmax_extend(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, offset: int | jax.Array, chunk: int | None = None
) -> jax.Array:
    """Softmax attention of C new positions offset..offset+C over caches that hold them and all before.

    q [Bq, C, H, dh]; k_cache [Bq, S, K, dh], v_cache [Bv, S, K, dv]; gives [Bv, C, H, dv] in v_cache's dtype. `offset`
    is an integer or a traced int32. What the caches hold from offset + C on is not read, but must be finite.
    """
    return query_chunks.mix(q, k_cache, v_cache, _SOFTMAX, chunk, offset)
