"""What the recurrences with a decay share: chunks of positions, borders of documents, and products of decays.

A chunk is a power of two, because decays are multiplied up a tree. In a block of s positions,

    into_t = a_1 a_2 .. a_t    from the block's begin up to and with t    (what position t still has of the past)
    out_t  = a_{t+1} .. a_s    after t up to the block's end              (what the block's end still has of t)

and two neighbours of s make one of 2 s. What the right one's i still has of the left one's j is into_i out_j. Both
are at most one whatever the decay: nothing is divided, and no large sums of logarithms are subtracted.

A document begins with a decay of zero. With that, and with no mask at all, its positions read neither the document
before it in their chunk, nor the state, and the state that is passed on holds nothing older.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped
from deconstruct.kernels.mask import Mask

# exp of it is zero in float64 too, and it may be summed and subtracted, where -inf may not.
_NOTHING = -1e4


def chunk_size(chunk: int, length: int) -> int:
    """The power of two that is not below min(chunk, length)."""
    return 1 << (min(chunk, length) - 1).bit_length()


def with_borders(log_decay: jax.Array, mask: Mask, qk_batch: int, batch: int) -> jax.Array:
    """log_decay [Bq, L, ...] with a decay of zero (-1e4) where a document begins.

    `qk_batch` is Bq, `batch` is Bv. ValueError for a mask with a window, which a sum over all of the past does not
    have; and for documents where one map serves several rows, or where `begins` is not [Bq, L].
    """
    if mask.window is not None:
        raise ValueError(f"a recurrence with a decay has no window (got window={mask.window}): its state is one sum")
    if mask.begins is None:
        return log_decay
    length = log_decay.shape[1]
    if qk_batch != batch or mask.begins.shape != (batch, length):
        raise ValueError(
            f"documents need a map for each row: begins of shape {mask.begins.shape}, queries of batch {qk_batch}, "
            f"values of batch {batch}, {length} positions"
        )
    first = mask.begins >= jnp.arange(length)[None]
    return jnp.where(first.reshape(*first.shape, *[1] * (log_decay.ndim - 2)), _NOTHING, log_decay)


def cut_queries(q: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """[b, L, H, dh] -> [chunks, b, K, size, G, dh]: positions before groups, so that a block of positions is one
    slice and its rows are (position, group)."""
    queries = grouped.split_queries(q, kv_heads).transpose(0, 1, 3, 2, 4)
    return jnp.moveaxis(grouped.cut(queries, 2, size), 2, 0)


def cut_keys(x: jax.Array, size: int) -> jax.Array:
    """[b, L, K, ...] -> [chunks, b, K, size, ...]."""
    return jnp.moveaxis(grouped.cut(jnp.moveaxis(x, 2, 1), 2, size), 2, 0)


def cut_values(v: jax.Array, batch: int, size: int) -> jax.Array:
    """[Bv, L, K, dv] -> [chunks, b, K, size, w], w = n dv."""
    values = grouped.cut(grouped.split_values(v, batch), 2, size)
    return jnp.moveaxis(values.reshape(*values.shape[:4], -1), 2, 0)


def join_results(out: jax.Array, length: int, dv: int) -> jax.Array:
    """[chunks, b, K, size, G, w] -> [Bv, L, H, dv]."""
    out = grouped.join(jnp.moveaxis(out, 0, 2), 2, length)
    out = out.reshape(*out.shape[:4], -1, dv)
    return grouped.merge_results(out.transpose(0, 1, 3, 2, 4, 5))


def double(into: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One level up the tree: `into` and `out` [..., N, s, d] of N blocks -> [..., N / 2, 2 s, d]."""
    left_into, right_into = halves(into)
    left_out, right_out = halves(out)
    return (
        jnp.concatenate([left_into, right_into * left_into[..., -1:, :]], axis=-2),
        jnp.concatenate([left_out * right_into[..., -1:, :], right_out], axis=-2),
    )


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The left and the right blocks, [..., N, s, d] -> two of [..., N / 2, s, d]."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]
