"""The axes in which every kernel works, and the small pieces they share.

Outside, q is [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv]; query head h reads kv head h // G with G = H / K, and
Bq is Bv or 1. Inside, heads stand before positions, so that a matmul's batch axes lead:

    queries b k g l d      keys b k s d      values b k s n e      results b k g l n e

with b = Bq and n = Bv / Bq: the n rows of the batch that share one map. A map therefore never gets an axis it does not
depend on, and one einsum serves both cases. Only axes of size one are made by the reshapes over the batch, which leaves
a sharded batch as it is. (Caches and states of decoding, which is not sharded, do merge the batch with the heads.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def accumulation_dtype(*arrays: jax.Array) -> Any:
    """The dtype of softmax, normalisers, sums and states: float32, or float64 as soon as one input is."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def contract(equation: str, *operands: jax.Array) -> jax.Array:
    """An einsum whose inputs keep their dtype (bf16 stays bf16) and whose sums and result are float32 (or float64)."""
    return jnp.einsum(equation, *operands, preferred_element_type=accumulation_dtype(*operands))


def exactly(equation: str, *operands: jax.Array) -> jax.Array:
    """An einsum for oracles and normalisers: float32 (or float64) inputs, and no faster product that drops bits."""
    dtype = accumulation_dtype(*operands)
    return jnp.einsum(equation, *(x.astype(dtype) for x in operands), precision=jax.lax.Precision.HIGHEST)


def split_queries(q: jax.Array, kv_heads: int) -> jax.Array:
    """[b, L, H, dh] -> [b, K, G, L, dh]. ValueError when the kv heads do not divide the query heads."""
    batch, length, heads, dim = q.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} kv heads: the second must divide the first")
    return q.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def split_keys(k: jax.Array) -> jax.Array:
    """[b, S, K, dh] -> [b, K, S, dh]."""
    return k.transpose(0, 2, 1, 3)


def split_rows(x: jax.Array, batch: int) -> jax.Array:
    """[Bv, ...] -> [b, n, ...]. ValueError unless b is Bv or 1."""
    if batch not in (1, x.shape[0]):
        raise ValueError(
            f"queries of batch {batch} and values of batch {x.shape[0]}: the first must be the second, or 1"
        )
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def merge_rows(x: jax.Array) -> jax.Array:
    """[b, n, ...] -> [Bv, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def split_values(v: jax.Array, batch: int) -> jax.Array:
    """[Bv, S, K, dv] -> [b, K, S, n, dv]."""
    return split_rows(v, batch).transpose(0, 3, 2, 1, 4)


def merge_results(out: jax.Array) -> jax.Array:
    """[b, K, G, L, n, dv] -> [Bv, L, H, dv]."""
    b, kv_heads, groups, length, n, dim = out.shape
    return out.transpose(0, 4, 3, 1, 2, 5).reshape(b * n, length, kv_heads * groups, dim)


def causal_mask(rows: int, columns: int, start: int | jax.Array = 0) -> jax.Array:
    """bool [rows, columns]: row i stands at position start + i and sees the columns up to there."""
    return (start + jnp.arange(rows))[:, None] >= jnp.arange(columns)[None, :]


def cut(x: jax.Array, axis: int, size: int, fill: float = 0.0) -> jax.Array:
    """Cuts a non-negative axis into [chunks, size], padded at its end with `fill`."""
    length = x.shape[axis]
    chunks = -(-length // size)
    if chunks * size != length:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, chunks * size - length)
        x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])


def join(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `cut`: [chunks, size] at `axis` become one axis, of which the first `length` are kept."""
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
