"""A cache of keys and values, laid out as the matmuls that read it want it: one batch axis, then a matrix.

Sequence and kv head share the first axis, positions come next: a decoded token reads its past as it lies. XLA's CPU
backend would copy the whole cache for each token if anything, were it but a reshape, stood between update and matmul.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped


class KVCache(NamedTuple):
    """Room for S positions, of which the first `length` are filled: a Python 0 in a new cache, then int32 [].

    A new cache that enters a compiled program as an argument is not known to be new there; make it inside.
    """

    k: jax.Array  # [Bq K, S, dh]
    v: jax.Array  # [Bq K, S, (Bv / Bq) dv]
    length: int | jax.Array

    @property
    def is_new(self) -> bool:
        """Whether it is known, when a program is traced, that nothing is in it."""
        return isinstance(self.length, int) and self.length == 0


def init_kv_cache(
    qk_batch: int, batch: int, length: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """An empty cache for `length` positions. `qk_batch` is Bq, `batch` is Bv."""
    rows = qk_batch * kv_heads
    return KVCache(jnp.zeros((rows, length, dh), dtype), jnp.zeros((rows, length, batch // qk_batch * dv), dtype), 0)


def laid_out(k: jax.Array, v: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """k [Bq, C, K, dh] and v [Bv, C, K, dv] as they lie in a cache: [Bq K, C, dh] and [Bq K, C, (Bv / Bq) dv]."""
    rows, positions = k.shape[0] * k.shape[2], k.shape[1]
    split = grouped.split_keys(k), grouped.split_values(v, k.shape[0])
    keys, values = (x.astype(dtype).reshape(rows, positions, -1) for x in split)
    return keys, values


def append(cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
    """C more positions, k [Bq, C, K, dh] and v [Bv, C, K, dv], behind those that are there."""
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(into, new, cache.length, axis=1)
        for into, new in zip((cache.k, cache.v), laid_out(k, v, cache.k.dtype), strict=True)
    )
    return KVCache(keys, values, cache.length + k.shape[1])


def contents(cache: KVCache, qk_batch: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """All S positions in the outer axes, k [Bq, S, K, dh] and v [Bv, S, K, dv]: a copy."""
    rows, room, dh = cache.k.shape
    keys = cache.k.reshape(qk_batch, rows // qk_batch, room, dh)
    values = cache.v.reshape(qk_batch, rows // qk_batch, room, batch // qk_batch, -1)
    return keys.transpose(0, 2, 1, 3), grouped.merge_rows(values.transpose(0, 3, 2, 1, 4))
