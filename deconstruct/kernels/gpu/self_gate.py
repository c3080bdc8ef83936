"""The self-gated running mean on a Hopper GPU: one pass over the values, and one back over them for the gradients.

    out_i = sum_{j<=i} p_ij v_j,    p_ij = exp(s_j - n_i)
    n_i = log sum_{j<=i} exp(s_j),    s_j = silu(q_j) . k_j / sqrt(dh)

XLA forms the scores, and the derivatives of queries and keys from theirs: products of rows, which it fuses by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import reference
from deconstruct.kernels.gpu import varying
from deconstruct.kernels.gpu.limits import refuse
from deconstruct.kernels.gpu.self_gate_kernels import CHUNK, LOG2E, mean_gradients, running_mean


def self_gate_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The running mean of the values, weighted by exp(s): q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give
    [Bv, L, H, dv] in v's dtype; Bq is Bv or 1, any L.

    Operands of products are rounded to v's dtype, scores and sums are float32. What `limits.refuses` names raises
    ValueError. Under a mesh it is to be called within `jax.shard_map`: XLA does not divide a kernel.
    """
    refuse(q, k, v)
    length = q.shape[1]
    if length % CHUNK:
        # Positions that are added stand after all others, and get a cotangent of zero.
        padding = ((0, 0), (0, -length % CHUNK), (0, 0), (0, 0))
        q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    return _mean(*varying.together(reference.gate_scores(q, k), v))[:, :length]


@jax.custom_vjp
def _mean(scores: jax.Array, v: jax.Array) -> jax.Array:
    """scores float32 [Bq, H, L], v [Bv, L, K, dv] -> [Bv, L, H, dv]; L is a multiple of 64."""
    return _forward(scores, v)[0]


def _forward(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = scores * LOG2E
    out, sums = varying.like(v, *running_mean(scores, v))
    return out, (jnp.stack([scores, sums[: scores.shape[0]]], axis=2), v, out)


def _backward(saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    numbers, v, out = saved
    g = g.astype(v.dtype)
    means = jnp.einsum("blhd,blhd->bhl", g, out, preferred_element_type=jnp.float32)
    dscores, dv = varying.like(v, *mean_gradients(numbers, v, g, means))
    if numbers.shape[0] < v.shape[0]:
        dscores = dscores.sum(0, keepdims=True)
    if dv.shape != v.shape:  # the query heads that read one kv head
        dv = dv.reshape(*v.shape[:3], -1, v.shape[3]).astype(jnp.float32).sum(3).astype(v.dtype)
    return dscores, dv


_mean.defvjp(_forward, _backward)
