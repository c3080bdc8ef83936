"""What the walks share: arrays cut into chunks with positions along the lanes, and the decays within a chunk.

A row is one sequence and one head of keys and values; its queries are those of the G heads that share them:

    q [N, T, dh, G C]    k [N, T, dh, C]    v [N, T, w, C]    out [N, T, w, G C]    N = Bq K, w = (Bv / Bq) dv

C positions to a chunk, the heads of a group one after the other. The map of a chunk is [keys, queries].

Decays as in `kernels.recurrent_chunks`: two positions are apart in one pair of neighbouring blocks of s = 1, 2, 4, ..,
where what the query still has of the key is into[query] out[key], both at most one. On the chip the sums of logarithms
that they are exponentials of are products with matrices of zeros and ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped
from deconstruct.kernels.mask import Mask, cut_begins


def cut_queries(q: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """[b, L, H, dh] -> [b K, T, dh, G C]."""
    x = grouped.cut(grouped.split_queries(q, kv_heads), 3, size)  # b k g t c d
    b, k, g, t, c, d = x.shape
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b * k, t, d, g * c)


def cut_keys(x: jax.Array, size: int) -> jax.Array:
    """[b, L, K, d] -> [b K, T, d, C]."""
    x = grouped.cut(grouped.split_keys(x), 2, size)  # b k t c d
    b, k, t, c, d = x.shape
    return x.transpose(0, 1, 2, 4, 3).reshape(b * k, t, d, c)


def cut_values(v: jax.Array, batch: int, size: int) -> jax.Array:
    """[Bv, L, K, dv] -> [b K, T, w, C]."""
    x = grouped.cut(grouped.split_values(v, batch), 2, size)  # b k t c n e
    b, k, t, c, n, e = x.shape
    return x.transpose(0, 1, 2, 4, 5, 3).reshape(b * k, t, n * e, c)


def join_results(out: jax.Array, like: jax.Array, heads: int, batch: int) -> jax.Array:
    """[b K, T, w, G C] -> [Bv, L, H, dv], for values `like` [Bv, L, K, dv] and b = `batch`."""
    rows, length, kv_heads, dv = like.shape
    groups = heads // kv_heads
    out = out.reshape(batch, kv_heads, out.shape[1], rows // batch, dv, groups, -1)  # b k t n e g c
    out = out.transpose(0, 1, 5, 2, 6, 3, 4)  # b k g t c n e
    return grouped.merge_results(grouped.join(out, 3, length))


class Chunk(NamedTuple):
    """Of one row, what a walk without gates is given at each step."""

    q: jax.Array  # [dh, G C]
    k: jax.Array  # [dh, C]
    v: jax.Array  # [w, C]
    begins: jax.Array | None  # int32 [1, C], counted from the first of the chunk


def cut(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, size: int) -> Chunk:
    """q [b, L, H, dh], k [b, L, K, dh], v [Bv, L, K, dv] in chunks of `size`, [b K, T, ...]. ValueError where the
    documents of the mask are not of shape [b, L]."""
    batch, kv_heads, begins = q.shape[0], k.shape[2], mask.begins_of(q)
    if begins is not None:
        begins = jnp.repeat(cut_begins(begins, size)[:, :, None], kv_heads, axis=0)
    return Chunk(cut_queries(q, kv_heads, size), cut_keys(k, size), cut_values(v, batch, size), begins)


def repeat(x: jax.Array, groups: int) -> jax.Array:
    """[a, C] -> [a, G C], for each head of a group."""
    return x if groups == 1 else jnp.concatenate([x] * groups, axis=1)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, exact: bool = False) -> jax.Array:
    """A product over one axis of each; bf16 stays bf16, float32 keeps its bits, the sum is float32."""
    if exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def causal(size: int) -> jax.Array:
    """bool [keys, queries]."""
    keys, queries = _positions(size)
    return keys <= queries


def itself(size: int) -> jax.Array:
    """bool [keys, queries]: the diagonal."""
    keys, queries = _positions(size)
    return keys == queries


class Level(NamedTuple):
    pairs: jax.Array  # bool [keys, queries]: apart in a pair of blocks of this size, the key on the left
    into: jax.Array  # float32 [C, C]: log_decay @ into sums from a block's begin up to and with a query
    out: jax.Array  # float32 [C, C]: log_decay @ out sums from after a key up to its block's end


def levels(size: int) -> Iterator[Level]:
    """Blocks of 1, 2, 4, .. C / 2 positions."""
    keys, queries = _positions(size)
    apart = keys ^ queries
    block = 1
    while block < size:
        yield Level((apart >= block) & (apart < 2 * block) & (keys < queries), *_sums(block, size))
        block *= 2


def of_the_chunk(size: int) -> Level:
    """The chunk as one block: what a query has of the state, and the state after the chunk of a key. No pairs."""
    return Level(jnp.zeros((size, size), bool), *_sums(size, size))


def _sums(block: int, size: int) -> tuple[jax.Array, jax.Array]:
    first, second = _positions(size)
    together = (first ^ second) < block
    return (together & (first <= second)).astype(jnp.float32), (together & (first > second)).astype(jnp.float32)


def _positions(size: int) -> tuple[jax.Array, jax.Array]:
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)
