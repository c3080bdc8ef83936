"""The Taylor form with the paper's small state: each order normalised by itself, only element-wise squares kept.

    out_i = ( mean_{j<=i} v_j  +  sum_j x_ij v_j / sum_j x_ij  +  sum_j y_ij v_j / sum_j y_ij ) / 3
    x_ij = q_i . k_j / sqrt(dh),    y_ij = sum_c q_ic^2 k_jc^2 / dh

(equations 14-17 of arXiv:2510.11602; the division by three and the guard are ours, see
`reference.taylor_diagonal_weights`.) Linear in L, with 2 dh dv numbers of state a head. The first-order sum can come
near zero and change sign: there the guard bounds a weight at about |x| / (1e-2 i), and the output jumps where the sum
passes through zero. `taylor` does not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped, reference

CHUNK = 64


class TaylorDiagonalState(NamedTuple):
    """The sums over all positions so far, float32 (float64 for float64 inputs); squares are element-wise."""

    n0: jax.Array  # [Bq]
    n1: jax.Array  # [Bq, K, dh], of k
    n2: jax.Array  # [Bq, K, dh], of k^2
    s0: jax.Array  # [Bv, K, dv], of v
    s1: jax.Array  # [Bv, K, dh, dv], of k v^T
    s2: jax.Array  # [Bv, K, dh, dv], of k^2 v^T


def init_taylor_diagonal_state(
    qk_batch: int, batch: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> TaylorDiagonalState:
    """The state before the first position: all sums zero. `qk_batch` is Bq, `batch` is Bv."""
    keys, values = (qk_batch, kv_heads, dh), (batch, kv_heads, dh, dv)
    return TaylorDiagonalState(
        n0=jnp.zeros((qk_batch,), dtype),
        n1=jnp.zeros(keys, dtype),
        n2=jnp.zeros(keys, dtype),
        s0=jnp.zeros((batch, kv_heads, dv), dtype),
        s1=jnp.zeros(values, dtype),
        s2=jnp.zeros(values, dtype),
    )


def taylor_diagonal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: TaylorDiagonalState | None = None,
    chunk: int = CHUNK,
    jointly: bool = False,
) -> tuple[jax.Array, TaylorDiagonalState]:
    """Linear-time Taylor attention by orders, each normalised by itself, or all by one sum (`jointly`).

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype, and the state after them; a
    sequence is extended by another call with that state. All chunks are worked on at once: the states before them are
    cumulative sums over chunks, 2 L dh dv / chunk numbers a head.
    """
    batch, length, _, dh = q.shape
    kv_heads = k.shape[2]
    dtype = grouped.accumulation_dtype(q, k, v)
    if state is None:
        state = init_taylor_diagonal_state(batch, v.shape[0], kv_heads, dh, v.shape[-1], dtype)
    size = min(chunk, length)
    # Axes: t counts chunks, l and s count positions within one.
    queries = grouped.cut(grouped.split_queries(q, kv_heads), 3, size)  # b k g t l d
    keys = grouped.cut(grouped.split_keys(k), 2, size)  # b k t s d
    values = grouped.cut(grouped.split_values(v, batch), 2, size)  # b k t s n e
    before, after = _states(state, keys, values, length)
    out = _mix(queries, keys, values, before, jointly)
    out = grouped.join(out, 3, length)
    return grouped.merge_results(out), after


def _states(
    state: TaylorDiagonalState, k: jax.Array, v: jax.Array, length: int
) -> tuple[TaylorDiagonalState, TaylorDiagonalState]:
    """The states before each chunk (chunk axis t first, rows [b, n]), and the one after all. Padding adds zeros."""
    dtype = state.n1.dtype
    chunks, size = k.shape[2], k.shape[3]
    exact = k.astype(dtype)
    batch = state.n1.shape[0]
    added = {
        "n1": exact.sum(3).transpose(2, 0, 1, 3),
        "n2": jnp.square(exact).sum(3).transpose(2, 0, 1, 3),
        "s0": v.astype(dtype).sum(3).transpose(2, 0, 3, 1, 4),
        "s1": grouped.contract("bktsd,bktsne->tbnkde", k, v),
        "s2": grouped.contract("bktsd,bktsne->tbnkde", k * k, v),
    }
    before, after = {}, {}
    for name, chunk in added.items():
        own = getattr(state, name)
        own = grouped.split_rows(own, batch) if name[0] == "s" else own
        total = jnp.cumsum(jnp.concatenate([own[None], chunk]), axis=0)
        before[name] = total[:-1]
        after[name] = grouped.merge_rows(total[-1]) if name[0] == "s" else total[-1]
    count = state.n0[None] + size * jnp.arange(chunks, dtype=dtype)[:, None]  # t b
    return TaylorDiagonalState(n0=count, **before), TaylorDiagonalState(n0=state.n0 + length, **after)


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, before: TaylorDiagonalState, jointly: bool) -> jax.Array:
    """One map within each chunk and one read of the states, each with all three orders in it: b k g t l n e."""
    size, dh = q.shape[-2:]
    dtype = before.n1.dtype
    mask = grouped.causal_mask(size, size)
    exact, squares = q.astype(dtype), jnp.square(q.astype(dtype))
    x = jnp.where(mask, grouped.contract("bkgtld,bktsd->bkgtls", q, k) * dh**-0.5, 0)
    y = jnp.where(mask, grouped.contract("bkgtld,bktsd->bkgtls", q * q, k * k) / dh, 0)
    sum1 = x.sum(-1) + grouped.exactly("bkgtld,tbkd->bkgtl", exact, before.n1) * dh**-0.5
    sum2 = y.sum(-1) + grouped.exactly("bkgtld,tbkd->bkgtl", squares, before.n2) / dh
    count = before.n0.T[..., None] + jnp.arange(1, size + 1, dtype=dtype)[None, None]
    count = count[:, None, None]  # b 1 1 t l
    by_one, by_x, by_y = _factors(count, sum1, sum2, jointly)
    weights = jnp.where(mask, by_one[..., None] + by_x[..., None] * x + by_y[..., None] * y, 0).astype(v.dtype)
    out = grouped.contract("bkgtls,bktsne->bkgtlne", weights, v)
    features = [exact * (by_x * dh**-0.5)[..., None], squares * (by_y / dh)[..., None]]
    states = jnp.concatenate([before.s1, before.s2], axis=-2).astype(q.dtype)
    out += grouped.contract("bkgtlf,tbnkfe->bkgtlne", jnp.concatenate(features, axis=-1).astype(q.dtype), states)
    out += by_one[..., None, None] * before.s0.transpose(1, 3, 0, 2, 4)[:, :, None, :, None]
    return out.astype(v.dtype)


def _factors(
    count: jax.Array, sum1: jax.Array, sum2: jax.Array, jointly: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What multiplies the plain 1, x and y of each past position, so that one matmul applies all three orders."""
    if jointly:
        total = count + sum1 + sum2 / 2
        delta = reference.guard(total, count, reference.GUARD)
        by_x = 1 / (total + delta)
        return by_x * (1 + delta / count), by_x, by_x / 2
    delta1, delta2 = (
        reference.guard(sums, count, least) for sums, least in ((sum1, reference.GUARD), (sum2, reference.GUARD**2))
    )
    by_x, by_y = 1 / (3 * (sum1 + delta1)), 1 / (3 * (sum2 + delta2))
    return (1 / 3 + delta1 * by_x + delta2 * by_y) / count, by_x, by_y
