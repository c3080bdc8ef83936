"""The gated delta rule on a Hopper GPU: S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, out_t = q_t S_t /
sqrt(dh).

In the chunks of `kernels.gated_delta`: what they are by themselves, and what they read, XLA computes for all at once;
the kernel carries the state from one to the next, and with it makes their corrections,

    U = (I + N)^-1 beta V - ((I + N)^-1 beta c K) S_0
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import gated_delta, grouped, recurrences, recurrent_chunks
from deconstruct.kernels.gpu.limits import refuse
from deconstruct.kernels.gpu.walk import CHUNK, walk
from deconstruct.kernels.mask import CAUSAL, Mask


def gated_delta_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, log_decay: jax.Array, beta: jax.Array, mask: Mask = CAUSAL
) -> jax.Array:
    """q [Bq, L, H, dh] and k [Bq, L, K, dh] of any length, v [Bv, L, K, dv], log_decay [Bq, L, K] (at most zero), beta
    [Bq, L, K] in [0, 1] -> [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. `mask` may have documents, then Bq is Bv. Any L.
    Decays, the inverse and the state are float32. ValueError for a window, and for what `limits.refuses` names.
    """
    refuse(q, k, v)
    (batch, length, _, dh), (kv_heads, dv) = q.shape, v.shape[2:]
    log_decay = recurrent_chunks.with_borders(log_decay.astype(jnp.float32), mask, batch, v.shape[0])
    cut = (
        recurrent_chunks.cut_queries(recurrences.unit(q).astype(q.dtype), kv_heads, CHUNK),
        recurrent_chunks.cut_keys(recurrences.unit(k).astype(k.dtype), CHUNK),
        recurrent_chunks.cut_values(v, batch, CHUNK),
        recurrent_chunks.cut_keys(log_decay, CHUNK),
        recurrent_chunks.cut_keys(beta.astype(jnp.float32), CHUNK),
    )
    count, parts = cut[0].shape[0], tuple(x.reshape(-1, *x.shape[2:]) for x in cut)  # [T b, K, C, ...]
    weights, into, *operands = jax.checkpoint(_operands)(*parts)
    states, written = walk(count, *operands)
    rows = parts[0].reshape(*states.shape[:2], -1, dh)
    out = gated_delta.read(weights, into, written, grouped.contract("bkrd,bkdw->bkrw", rows, states))
    out = (out * dh**-0.5).astype(v.dtype)
    return recurrent_chunks.join_results(out.reshape(count, batch, *out.shape[1:]), length, dv)


def _operands(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array) -> tuple[jax.Array, ...]:
    """The weights and decays with which chunks are read, and what the walk takes: decays, and what reads the state, is
    written to it, and is what the corrections are where there is no state."""
    inverse, weights, into, kept = gated_delta.by_themselves(q, k, log_decay, beta)
    held = ((beta * into)[..., None] * k).astype(k.dtype)
    reads = -grouped.contract("bkij,bkjd->bkid", inverse, held).astype(k.dtype)
    values = grouped.contract("bkij,bkjw->bkiw", inverse, (beta[..., None] * v).astype(v.dtype)).astype(v.dtype)
    decay = jnp.broadcast_to(into[..., -1:], (*into.shape[:2], k.shape[-1]))
    return weights, into, decay, reads, kept, values
