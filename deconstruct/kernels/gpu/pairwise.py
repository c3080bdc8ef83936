"""Attention by a causal map of pairwise logits on a Hopper GPU: Taylor's weights, and softmax where one map serves all.

    out_i = sum_{j<=i} w(x_ij) v_j / sum_{j<=i} w(x_ij),    x_ij = q_i . k_j / sqrt(dh)

The map is never in memory: blocks of it are formed in registers, forward and backward (Dao et al., arXiv:2205.14135),
and what is above the diagonal is not formed at all. Where Bq = 1 the logits of a block are formed once for as many
sequences of the batch as registers hold sums for, not once for each. Operands of products are rounded to the inputs'
dtype, sums and normalisers are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deconstruct.kernels.gpu import varying
from deconstruct.kernels.gpu.limits import refuse
from deconstruct.kernels.gpu.pairwise_backward import Given, key_and_value_gradients, query_gradients
from deconstruct.kernels.gpu.pairwise_forward import forward
from deconstruct.kernels.gpu.pipeline import BLOCK
from deconstruct.kernels.gpu.weighing import SOFTMAX, TAYLOR, Weighing

# Value channels, of sequences that share a map, for which a kernel forms it once: as many as its memory allows.
FORWARD_WIDTH, QUERY_WIDTH, KEY_WIDTH = 256, 256, 128


def taylor_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Second-order Taylor attention of a whole sequence: w(x) = 1 + x + x^2 / 2, jointly normalised.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1, any L. What
    `limits.refuses` names raises ValueError. Under a mesh it is to be called within `jax.shard_map`: XLA does not
    divide a kernel.
    """
    return pairwise_attention(q, k, v, TAYLOR)


def shared_attention(q: jax.Array, k: jax.Array, v: jax.Array, weighing: Weighing = SOFTMAX) -> jax.Array:
    """Attention by one map for the whole batch: q [1, L, H, dh], k [1, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv].

    The rest as for `taylor_attention`.
    """
    if q.shape[0] != 1:
        raise ValueError(f"queries of batch {q.shape[0]}: a shared map has a batch of one")
    return pairwise_attention(q, k, v, weighing)


def pairwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, weighing: Weighing) -> jax.Array:
    """What the two above have in common."""
    refuse(q, k, v)
    length = q.shape[1]
    # Keys that are added stand after all queries, and queries that are added get a cotangent of zero.
    padding = ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0))
    if length % BLOCK:
        q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    return _attend(weighing, *varying.together(q, k, v))[:, :length]


def _shared(q: jax.Array, v: jax.Array, width: int) -> int:
    """How many sequences are mixed by each map that is formed: a divisor of Bv, with at most `width` channels."""
    if q.shape[0] == v.shape[0]:
        return 1
    return max(n for n in range(1, max(1, width // v.shape[-1]) + 1) if v.shape[0] % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(weighing: Weighing, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward(weighing, q, k, v)[0]


def _forward(weighing: Weighing, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    out, kept = varying.like(v, *forward(q, k, v, weighing, _shared(q, v, FORWARD_WIDTH)))
    return out, (q, k, v, out, kept)


def _backward(weighing: Weighing, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, kept = saved
    g = g.astype(v.dtype)
    means = jnp.einsum("blhd,blhd->bhl", g, out, preferred_element_type=jnp.float32)

    def given(width: int) -> Given:
        shared = _shared(q, v, width)
        of_groups = means.reshape(-1, shared, *means.shape[1:]).sum(1)
        return Given(q, k, v, g, jnp.stack([jnp.broadcast_to(kept, of_groups.shape), of_groups], axis=2))

    (dq,) = varying.like(v, query_gradients(given(QUERY_WIDTH), weighing))
    dk, dv = varying.like(v, *key_and_value_gradients(given(KEY_WIDTH), weighing))
    return _over_groups(dq, q), _over_groups(dk, k), dv


def _over_groups(parts: jax.Array, like: jax.Array) -> jax.Array:
    """Where one map served all, the sum of what the groups of sequences gave to it."""
    if parts.shape[0] == like.shape[0]:
        return parts
    return parts.astype(jnp.float32).sum(0, keepdims=True).astype(like.dtype)


_attend.defvjp(_forward, _backward)
