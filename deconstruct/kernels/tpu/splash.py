"""Softmax attention by JAX's own TPU kernel (splash attention), on the house's arrays.

It serves causal masks, windows and documents, one map for each sequence; `kernels.tpu.pairwise` serves what it cannot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from deconstruct.kernels.mask import CAUSAL, Mask

LANES = 128
BLOCK = 512


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, interpret: bool = False
) -> jax.Array:
    """Causal softmax attention: q [B, L, H, dh], k [B, L, K, dh], v [B, L, K, dv] -> [B, L, H, dv] in v's dtype.

    `mask` may have documents (begins [B, L]) and a window. Any L: it is padded to whole blocks of 128. `interpret`:
    on any device, for tests (JAX's interpreter of TPUs does not take what `vmap` makes of a kernel).
    """
    length, heads, dh = q.shape[1:]
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    begins = mask.begins_of(q)
    block = min(BLOCK, -(-length // LANES) * LANES)
    padded = -(-length // block) * block

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (padded, padded)
    seen = splash.CausalMask(shape) if mask.window is None else splash.LocalMask(shape, (mask.window - 1, 0), 0)
    # One kernel a head of keys and values, for the queries that share it.
    kernel = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([seen] * groups), block_sizes=sizes, interpret=interpret
    )
    segments = None
    if begins is not None:
        begins = jnp.pad(begins.astype(jnp.int32), ((0, 0), (0, padded - length)), mode="edge")
        segments = splash.SegmentIds(begins, begins)
    queries = heads_first(q * jnp.asarray(dh**-0.5, q.dtype))
    queries = queries.reshape(-1, kv_heads, groups, padded, dh)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    over_batch = jax.vmap(over_heads, in_axes=(0, 0, 0, None if segments is None else 0))
    out = over_batch(queries, heads_first(k), heads_first(v), segments)
    return out.reshape(-1, heads, padded, v.shape[-1]).transpose(0, 2, 1, 3)[:, :length].astype(v.dtype)
