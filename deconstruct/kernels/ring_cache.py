"""A cache of the last keys and values alone, for forms with a window: what leaves the window is overwritten.

Laid out like a `KVCache`, and as fast for a decoded token: it is written where the oldest position lies, and all is
read as it lies. Position p, counted from the beginning of the sequence, has the place p mod room.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import kv_cache, query_chunks
from deconstruct.kernels.kv_cache import KVCache
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.softmax import SOFTMAX


class RingCache(NamedTuple):
    """Room for the last R positions of the `length` that there were: a Python 0 in a new cache, then int32 [].

    A new cache that enters a compiled program as an argument is not known to be new there; make it inside.
    """

    k: jax.Array  # [Bq K, R, dh]
    v: jax.Array  # [Bq K, R, (Bv / Bq) dv]
    length: int | jax.Array

    @property
    def is_new(self) -> bool:
        """Whether it is known, when a program is traced, that nothing is in it."""
        return isinstance(self.length, int) and self.length == 0


def init_ring_cache(
    qk_batch: int, batch: int, length: int, window: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike
) -> RingCache:
    """An empty cache for sequences of up to `length` positions of which `window` are seen: R is the smaller of both.

    `qk_batch` is Bq, `batch` is Bv.
    """
    return RingCache(*kv_cache.init_kv_cache(qk_batch, batch, min(window, length), kv_heads, dh, dv, dtype))


def windowed_extend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: RingCache,
    mask: Mask,
    weighing: query_chunks.Weighing = SOFTMAX,
    chunk: int | None = None,
) -> tuple[jax.Array, RingCache]:
    """C more positions: what they see, themselves included, [Bv, C, H, dv] in v's dtype, and the cache after them.

    q [Bq, C, H, dh], k [Bq, C, K, dh], v [Bv, C, K, dv]. `mask` counts from the first of the C positions, has a window
    (ValueError without one) and, if it has documents, begins of shape [Bq, C]. The window is at most the one that the
    cache was made for. `weighing` is the form's: softmax, or `taylor.TAYLOR`. No gradients are provided for.
    """
    if mask.window is None:
        raise ValueError("a ring cache serves a window only: the mask has none")
    begins = mask.begins_of(q)
    count, room = q.shape[1], cache.k.shape[1]
    keys, values = kv_cache.laid_out(k, v, cache.k.dtype)
    if count == 1:
        place = cache.length % room
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(into, new, place, axis=1)
            for into, new in ((cache.k, keys), (cache.v, values))
        )
        age = (cache.length - jnp.arange(room)) % room  # of what lies at each place: 0 is the new position
        seen = (age < mask.window) & (age <= cache.length)
        seen = seen[None] if begins is None else seen[None] & (age[None] <= -begins)
        out = query_chunks.read(q, keys, values, seen[:, None, None], v.shape[0], weighing)
        return out.astype(v.dtype), RingCache(keys, values, cache.length + 1)
    # Old first: what is there are the positions length - room and on, some of them before the first there was.
    order = (cache.length + jnp.arange(room)) % room
    keys, values = (
        jnp.concatenate([old if cache.is_new else jnp.take(old, order, axis=1), new], axis=1)
        for old, new in ((cache.k, keys), (cache.v, values))
    )
    if cache.is_new:
        out = query_chunks.mix(q, k, v, weighing, chunk, mask)
    else:
        # Nothing before the first position there was is seen, as if a document began there.
        first = jnp.full(q.shape[:2], -cache.length, jnp.int32)
        seen_from = Mask(first if begins is None else jnp.maximum(first, begins), mask.window)
        lies = KVCache(keys, values, room + count)
        out = query_chunks.mix(q, *kv_cache.contents(lies, q.shape[0], v.shape[0]), weighing, chunk, seen_from)
    length = cache.length + count
    places = (jnp.arange(room) - length) % room
    keys, values = (jnp.take(x[:, -room:], places, axis=1) for x in (keys, values))
    return out.astype(v.dtype), RingCache(keys, values, length)
