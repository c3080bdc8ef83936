"""Second-order Taylor attention, exact and jointly normalised: quadratic for short sequences, linear for long ones.

    A_ij = T(x_ij) / sum_{m<=i} T(x_im),    T(x) = 1 + x + x^2 / 2,    x_ij = q_i . k_j / sqrt(dh)

T(x) = ((1 + x)^2 + 1) / 2 is at least 1/2, so no denominator is near zero. T(x) is the inner product of the features
phi(q) . phi(k), phi(a) = [1, a, vec(a a^T)/sqrt 2] (Based, Arora et al. 2024), so the sums over the past are states:

    n0 = sum 1    n1 = sum k_j    n2 = sum k_j k_j^T    s0 = sum v_j    s1 = sum k_j v_j^T    s2 = sum pairs(k_j) v_j

a a^T is symmetric, and each product is taken once: `pairs` are the dh (dh + 1) / 2 of them (dh (dh + 2) / 2 where dh
is even), by the distance of the two entries around a circle of dh, so that they are shifts of a and no gather.
States are float32 and carry neither the scale nor the 1/2: both are applied to what is read. With documents, the sums
run over the positions of the last one alone, and only positions of that document read them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.kernels import grouped, query_chunks
from deconstruct.kernels.mask import CAUSAL, Mask, cut_begins

CHUNK = 128


class TaylorState(NamedTuple):
    """The sums over all positions of the document so far, float32 (float64 for float64 inputs).

    Laid out like a `KVCache`, so that a decoded token updates it in place: Z = Bq K counts sequences and kv heads,
    w = (Bv / Bq) dv.
    """

    n0: jax.Array  # [Z]
    n1: jax.Array  # [Z, dh]
    n2: jax.Array  # [Z, dh, dh]
    s0: jax.Array  # [Z, w]
    s1: jax.Array  # [Z, dh, w]
    s2: jax.Array  # [Z, pairs, w]


def init_taylor_state(
    qk_batch: int, batch: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> TaylorState:
    """The state before the first position: all sums zero. `qk_batch` is Bq, `batch` is Bv."""
    rows, width = qk_batch * kv_heads, batch // qk_batch * dv
    return TaylorState(
        n0=jnp.zeros((rows,), dtype),
        n1=jnp.zeros((rows, dh), dtype),
        n2=jnp.zeros((rows, dh, dh), dtype),
        s0=jnp.zeros((rows, width), dtype),
        s1=jnp.zeros((rows, dh, width), dtype),
        s2=jnp.zeros((rows, pair_count(dh), width), dtype),
    )


def _slope(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, 1 + x, 0)


def _weights(slope: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, (slope * slope + 1) / 2, 0)


TAYLOR = query_chunks.Weighing(_slope, _weights)


def taylor_quadratic(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk: int | None = None, mask: Mask = CAUSAL
) -> jax.Array:
    """The map itself, by chunks of queries: q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv]."""
    return query_chunks.mix(q, k, v, TAYLOR, chunk, mask)


def taylor_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: TaylorState | None = None,
    chunk: int = CHUNK,
    mask: Mask = CAUSAL,
) -> tuple[jax.Array, TaylorState]:
    """The same in time linear in L: the map within a chunk, the state for all that came before it.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] and the state after them. A sequence is
    extended by another call with that state. Any L: padding at the end is zeros, which add nothing to any sum. The
    backward pass forms the features again, chunk by chunk, and keeps one state a chunk. Where the first document of
    the mask began before these positions (`begins` < 0), it is the one whose sums the state holds; the state after
    them is of the last document. ValueError for a window, and for `begins` not of shape [Bq, L].
    """
    mask.refuse_window("taylor_chunked")
    begins = mask.begins_of(q)
    batch, length, heads, dh = q.shape
    kv_heads, dv = v.shape[2:]
    decoding = state is not None and length == 1
    if state is None:
        state = init_taylor_state(batch, v.shape[0], kv_heads, dh, dv, grouped.accumulation_dtype(q, k, v))
    groups, size = heads // kv_heads, min(chunk, length)
    queries = jnp.moveaxis(grouped.cut(grouped.split_queries(q, kv_heads), 3, size), 3, 0)
    keys = jnp.moveaxis(grouped.cut(grouped.split_keys(k), 2, size), 2, 0)
    values = jnp.moveaxis(grouped.cut(grouped.split_values(v, batch), 2, size), 2, 0)
    # As in `query_chunks`: r = groups x positions, w = rows x dv.
    queries = queries.reshape(*queries.shape[:3], -1, dh)
    values = values.reshape(*values.shape[:4], -1)
    if decoding:
        goes_on = None if begins is None else jnp.repeat(begins[:, 0] < 0, kv_heads)
        one = tuple(x.reshape(-1, *x.shape[3:]) for x in (queries, keys, values))
        state, out = _single(state, one, goes_on)
    else:
        borders = None if begins is None else jnp.moveaxis(cut_begins(begins, size), 1, 0)
        rows = TaylorState(*(x.reshape(batch, kv_heads, *x.shape[1:]) for x in state))
        rows, out = jax.lax.scan(jax.checkpoint(_step, prevent_cse=False), rows, (queries, keys, values, borders))
        state = TaylorState(*(x.reshape(-1, *x.shape[2:]) for x in rows))
        # Padding adds nothing to any other sum.
        state = state._replace(n0=state.n0 - (keys.shape[0] * size - length))
    out = out.reshape(-1, batch, kv_heads, groups, size, v.shape[0] // batch, dv)
    return grouped.merge_results(grouped.join(jnp.moveaxis(out, 0, 3), 3, length)), state


def _step(state: TaylorState, chunk: tuple[Any, ...]) -> tuple[TaylorState, jax.Array]:
    """One chunk, q [b, K, r, dh], k [b, K, s, dh], v [b, K, s, w]: the state after it, and what it reads [b, K, r, w]
    from itself and from the state before. `begins` [b, s] of the chunk's own positions, or None."""
    q, k, v, begins = chunk
    positions = k.shape[-2]
    groups = q.shape[-2] // positions
    if begins is None:
        mask = jnp.tile(grouped.causal_mask(positions, positions), (groups, 1))
    else:
        mask = jnp.tile(Mask(begins).dense(positions, positions), (1, 1, groups, 1))
    x = grouped.contract("...rd,...sd->...rs", q, k) * q.shape[-1] ** -0.5
    weights = _weights(_slope(x, mask), mask)
    numerator, sums = _read(state, q)
    count: int | jax.Array = positions
    if begins is not None:
        # Selected, not multiplied by zero: another document's sums may be of any size.
        goes_on = jnp.tile(begins < 0, (1, groups))[:, None]
        numerator, sums = jnp.where(goes_on[..., None], numerator, 0), jnp.where(goes_on, sums, 0)
        last = begins[:, -1]
        kept = (jnp.arange(positions)[None, :] >= last[:, None])[:, None]
        state, count = _kept(state, last[:, None] < 0), kept.sum(-1).astype(sums.dtype)
        kept_k, kept_v = (jnp.where(kept[..., None], x, 0) for x in (k, v))
    else:
        kept_k, kept_v = k, v
    numerator += grouped.contract("...rs,...sw->...rw", weights.astype(v.dtype), v)
    return _add(state, kept_k, kept_v, count), (numerator / (sums + weights.sum(-1))[..., None]).astype(v.dtype)


def _kept(state: TaylorState, goes_on: jax.Array) -> TaylorState:
    """The state where its document goes on, zero where it ended; `goes_on` has leading axes of the arrays."""

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(goes_on.reshape(goes_on.shape + (1,) * (x.ndim - goes_on.ndim)), x, 0)

    return TaylorState(*(keep(x) for x in state))


def _single(
    state: TaylorState, chunk: tuple[jax.Array, ...], goes_on: jax.Array | None
) -> tuple[TaylorState, jax.Array]:
    """A chunk of one position. It reads itself out of the state after it, so that the state is updated in place.

    All in the dtype of the state: rounded features would not give a position's own value back. `goes_on` [Z], or None:
    whether the position is of the document that the state is of.
    """
    q, k, v = chunk
    exact = state.n1.dtype
    if goes_on is not None:
        state = _kept(state, goes_on)
    state = _add(state, k.astype(exact), v.astype(exact), 1)
    numerator, sums = _read(state, q.astype(exact))
    return state, (numerator / sums[..., None]).astype(v.dtype)


def _read(state: TaylorState, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the positions in a state give to the queries: numerators [..., r, w] and normalisers [..., r]."""
    scale = q.shape[-1] ** -0.5
    numerator = state.s0[..., None, :] + grouped.contract("...rd,...dw->...rw", q, state.s1.astype(q.dtype)) * scale
    numerator += grouped.contract("...rp,...pw->...rw", _pairs(q, True), state.s2.astype(q.dtype)) * (scale**2 / 2)
    # The three orders of the normaliser may cancel in part (only their sum is positive): float32 from the inputs on.
    exact = q.astype(state.n1.dtype)
    sums = state.n0[..., None] + grouped.exactly("...rd,...d->...r", exact, state.n1) * scale
    sums += (grouped.exactly("...rd,...dc->...rc", exact, state.n2) * exact).sum(-1) * (scale**2 / 2)
    return numerator, sums


def _add(state: TaylorState, k: jax.Array, v: jax.Array, count: int | jax.Array) -> TaylorState:
    exact = k.astype(state.n1.dtype)
    return TaylorState(
        n0=state.n0 + count,
        n1=state.n1 + exact.sum(-2),
        n2=state.n2 + grouped.exactly("...sd,...sc->...dc", exact, exact),
        s0=state.s0 + v.astype(state.s0.dtype).sum(-2),
        s1=state.s1 + grouped.contract("...sd,...sw->...dw", k, v),
        s2=state.s2 + grouped.contract("...sp,...sw->...pw", _pairs(k), v),
    )


def pair_count(dh: int) -> int:
    """How many products `_pairs` takes of dh entries: distances 0 to dh / 2 around the circle, dh of each."""
    return dh * (dh // 2 + 1)


def _pairs(x: jax.Array, counted: bool = False) -> jax.Array:
    """The products x_a x_(a + r) for r = 0 .. dh / 2, indices around the circle: [..., dh] -> [..., pair_count(dh)].

    `counted`: each times how often it stands in x x^T, twice but for the squares, and for r = dh / 2, which meets
    every pair from both sides. So pairs(q, counted) . pairs(k) = (q . k)^2.
    """
    dh = x.shape[-1]
    distances = dh // 2 + 1
    # Row r of dh + 1 entries of the repeated vector begins r entries further on.
    repeated = jnp.concatenate([x] * (distances + 1), axis=-1)[..., : distances * (dh + 1)]
    shifted = repeated.reshape(*x.shape[:-1], distances, dh + 1)[..., :dh]
    if counted:
        times = np.full((distances, 1), 2.0)
        times[0] = 1
        if dh % 2 == 0:
            times[-1] = 1
        shifted = shifted * jnp.asarray(times, x.dtype).reshape((1,) * (x.ndim - 1) + times.shape)
    return (shifted * x[..., None, :]).reshape(*x.shape[:-1], -1)


def chunked_is_cheaper(
    length: int,
    head_dim: int,
    value_dim: int | None = None,
    groups: int = 1,
    rows: int = 1,
    chunk: int = CHUNK,
    query_chunk: int | None = None,
) -> bool:
    """Whether `taylor_chunked` needs fewer matmul FLOPs than `taylor_quadratic`, forward, for each query head.

    A pair of positions costs 2 (dh + e) FLOPs, e = rows * dv: its logit once, its weight applied to the values of the
    `rows` = Bv / Bq that share a map. With query chunks of W (those of `query_chunks` unless given) the quadratic form
    takes L (L + W) / 2 pairs. The chunked form takes L C pairs, and for each position a read of the first- and
    second-order sums, 2 (dh + P) e with P = `pair_count(dh)`, and of their normalisers, 2 (dh + dh^2); as much again to
    add to them, shared by the `groups` = H / K query heads of one kv head. The 1/L of ragged last chunks is left out.
    For dh = dv = 64 and one group they meet near L = 4300: a model trained at 2048 takes the quadratic form.
    """
    width = rows * (value_dim or head_dim)
    pair = 2 * (head_dim + width)
    quadratic = length * (length + min(query_chunk or query_chunks.default_chunk(length), length)) / 2 * pair
    touch = 2 * ((head_dim + pair_count(head_dim)) * width + head_dim + head_dim**2)
    size = min(chunk, length)
    return length * (size * pair + touch * (1 + 1 / groups)) < quadratic


def taylor_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    """Second-order Taylor attention of a whole sequence, by whichever form counts fewer FLOPs at this length.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1. Under a
    window the quadratic form is the one there is, and costs no more than L x (window + chunk).
    """
    groups, rows = q.shape[2] // k.shape[2], v.shape[0] // q.shape[0]
    if mask.window is None and chunked_is_cheaper(q.shape[1], q.shape[-1], v.shape[-1], groups, rows):
        return taylor_chunked(q, k, v, mask=mask)[0]
    return taylor_quadratic(q, k, v, mask=mask)
