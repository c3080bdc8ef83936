"""Gated linear attention on a Hopper GPU: S_t = diag(a_t) S_{t-1} + k_t v_t^T, out_t = q_t S_t / sqrt(dh).

In the chunks of `kernels.gated_linear`: what they are by themselves, and what they read, XLA computes for all at once;
the kernel carries the state from one to the next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import gated_linear, grouped, recurrent_chunks
from deconstruct.kernels.gpu.limits import refuse
from deconstruct.kernels.gpu.walk import CHUNK, walk
from deconstruct.kernels.mask import CAUSAL, Mask


def gated_linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, mask: Mask = CAUSAL
) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv], log_decay [Bq, L, K, dh] (at most zero) -> [Bv, L, H, dv]
    in v's dtype; Bq is Bv or 1. `mask` may have documents, then Bq is Bv. Any L. Decays, their products and the state
    are float32. ValueError for a window, and for what `limits.refuses` names.
    """
    refuse(q, k, v)
    (batch, length, _, dh), (kv_heads, dv) = q.shape, v.shape[2:]
    log_decay = recurrent_chunks.with_borders(log_decay.astype(jnp.float32), mask, batch, v.shape[0])
    cut = (
        recurrent_chunks.cut_queries(q, kv_heads, CHUNK),
        recurrent_chunks.cut_keys(k, CHUNK),
        recurrent_chunks.cut_values(v, batch, CHUNK),
        recurrent_chunks.cut_keys(log_decay, CHUNK),
    )
    count, parts = cut[0].shape[0], tuple(x.reshape(-1, *x.shape[2:]) for x in cut)  # [T b, K, C, ...]
    # Decays at each level of a tree are as large as the keys, and float32: they are formed again for gradients.
    within, rows, kept, decay = jax.checkpoint(gated_linear.by_themselves)(*parts)
    states, _ = walk(count, decay, None, kept, parts[2])
    out = within + grouped.contract("bkrd,bkdw->bkrw", rows, states).reshape(within.shape)
    out = (out * dh**-0.5).astype(v.dtype)
    return recurrent_chunks.join_results(out.reshape(count, batch, *out.shape[1:]), length, dv)
