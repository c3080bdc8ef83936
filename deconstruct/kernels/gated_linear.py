"""Gated linear attention (Yang et al. 2024, arXiv:2312.06635): a sum over the past that forgets, channel by channel.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,    out_t = q_t S_t / sqrt(dh),    a_t = exp(g_t) in (0, 1]^dh

Nothing is normalised. In chunks: the map within a chunk, the state for what came before it. Two positions j < i of a
chunk are far apart in just one block of the tree in `recurrent_chunks`, where j is in the left half and i in the right;
what i still has of j is a product of two factors that are at most one,

    A_ij = sum_c (q_ic into_ic) (k_jc out_jc) / sqrt(dh)

so that a block is one matmul however strong the decay. Decays, their products, sums and the state are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped, recurrent_chunks
from deconstruct.kernels.mask import CAUSAL, Mask

CHUNK = 64

# Up to here the levels of the tree share one product each over the whole block, of which a part is kept.
_BLOCK = 16


class GatedLinearState(NamedTuple):
    """S after the positions so far, float32 (float64 for float64 inputs), without the scale.

    Laid out like a `KVCache`, so that a decoded token updates it in place: Bq K counts sequences and kv heads,
    w = (Bv / Bq) dv.
    """

    s: jax.Array  # [Bq K, dh, w]


def init_gated_linear_state(
    qk_batch: int, batch: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> GatedLinearState:
    """The state before the first position: zero. `qk_batch` is Bq, `batch` is Bv."""
    return GatedLinearState(jnp.zeros((qk_batch * kv_heads, dh, batch // qk_batch * dv), dtype))


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array,
    state: GatedLinearState | None = None,
    mask: Mask = CAUSAL,
    chunk: int = CHUNK,
) -> tuple[jax.Array, GatedLinearState]:
    """Gated linear attention of a whole sequence, or of the next piece of one.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv], log_decay [Bq, L, K, dh] (g <= 0, of any size) ->
    [Bv, L, H, dv] in v's dtype, and the state after them; a sequence is extended by another call with that state. Bq is
    Bv or 1. `mask` may have documents (then Bq is Bv); ValueError for a window. Any L: what is padded is zeros, with a
    decay of one. A `chunk` is rounded up to a power of two.
    """
    batch, length, _, dh = q.shape
    kv_heads, dv = v.shape[2:]
    exact = grouped.accumulation_dtype(q, k, v)
    log_decay = recurrent_chunks.with_borders(log_decay.astype(exact), mask, batch, v.shape[0])
    if state is None:
        state = init_gated_linear_state(batch, v.shape[0], kv_heads, dh, dv, exact)
    size = recurrent_chunks.chunk_size(chunk, length)
    chunks = (
        recurrent_chunks.cut_queries(q, kv_heads, size),
        recurrent_chunks.cut_keys(k, size),
        recurrent_chunks.cut_values(v, batch, size),
        recurrent_chunks.cut_keys(log_decay, size),
    )
    if length == 1:
        s, out = _single(state.s, *(x.reshape(-1, *x.shape[4:]) for x in chunks))
        out = out.reshape(1, batch, kv_heads, 1, *out.shape[1:])
    else:
        s = state.s.reshape(batch, kv_heads, *state.s.shape[1:])
        s, out = jax.lax.scan(jax.checkpoint(_step, prevent_cse=False), s, chunks)
        s = s.reshape(state.s.shape)
    return recurrent_chunks.join_results(out, length, dv), GatedLinearState(s)


def _single(
    s: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One position, q [z, G, dh], k and log_decay [z, dh], v [z, w], read out of the state after it, [z, dh, w], which
    is thus updated in place. All in the dtype of the state, so that a position's own value is not rounded twice."""
    exact = s.dtype
    s = jnp.exp(log_decay)[:, :, None] * s + k.astype(exact)[:, :, None] * v.astype(exact)[:, None]
    out = grouped.contract("zgd,zdw->zgw", q.astype(exact), s)
    return s, (out * q.shape[-1] ** -0.5).astype(v.dtype)


def _step(s: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """One chunk, q [b, K, C, G, dh], k and log_decay [b, K, C, dh], v [b, K, C, w]: the state [b, K, dh, w] after it,
    and what it reads [b, K, C, G, w] from itself and from the state before."""
    v, dh = chunk[2], chunk[0].shape[-1]
    within, rows, kept, decay = by_themselves(*chunk)
    before = grouped.contract("bkrd,bkdw->bkrw", rows, s.astype(rows.dtype)).reshape(within.shape)
    s = decay[..., None] * s + grouped.contract("bksd,bksw->bkdw", kept, v)
    return s, ((within + before) * dh**-0.5).astype(v.dtype)


def by_themselves(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What chunks are without the state before them: what they read from themselves [b, K, C, G, w], without the scale;
    the rows [b, K, C G, dh] that read the state, the keys [b, K, C, dh] that are added to it, and its decay [b, K, dh].

    q [b, K, C, G, dh], k and log_decay [b, K, C, dh], v [b, K, C, w].
    """
    batch, kv_heads, *_, dh = q.shape
    within, into, out = _within(q, k, v, jnp.exp(log_decay))
    rows = (q * into[:, :, :, None]).astype(q.dtype).reshape(batch, kv_heads, -1, dh)
    return within, rows, (k * out).astype(k.dtype), into[:, :, -1]


def _within(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a chunk reads from itself [b, K, C, G, w], and the decays into and out of it, two of [b, K, C, dh]."""
    batch, kv_heads, size, _, dh = q.shape
    block = min(_BLOCK, size)
    into = decay.reshape(batch, -1, 1, dh)
    into, out, within = _within_blocks(block, q, k, v, into)
    while block < size:
        rows = _weighted(recurrent_chunks.halves(_blocks(q, block))[1], recurrent_chunks.halves(into)[1], dh)
        columns = _weighted(recurrent_chunks.halves(_blocks(k, block))[0], recurrent_chunks.halves(out)[0], dh)
        weights = grouped.contract("bnrd,bnsd->bnrs", rows, columns)
        added = grouped.contract(
            "bnrs,bnsw->bnrw", weights.astype(v.dtype), recurrent_chunks.halves(_blocks(v, block))[0]
        )
        left, right = recurrent_chunks.halves(within)
        within = jnp.concatenate([left, right + added], axis=-2)
        into, out = recurrent_chunks.double(into, out)
        block *= 2
    shape = (batch, kv_heads, size, dh)
    return within.reshape(*q.shape[:-1], -1), into.reshape(shape), out.reshape(shape)


def _within_blocks(
    block: int, q: jax.Array, k: jax.Array, v: jax.Array, into: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for the blocks of a chunk, each by itself: the decays two of [b, N, block, dh], and what the blocks
    read [b, N, block G, w]. `into` is [b, N block, 1, dh], the decays themselves."""
    batch, dh, groups = q.shape[0], q.shape[-1], q.shape[3]
    rows, columns, out = _blocks(q, block), _blocks(k, block), jnp.ones_like(into)
    # A position has itself whole.
    products = q.astype(into.dtype) * k.astype(into.dtype)[:, :, :, None]
    weights = jnp.where(
        jnp.eye(block, dtype=bool)[:, None], products.sum(-1).reshape(batch, -1, block, groups)[..., None], 0
    )
    apart = jnp.arange(block)[:, None] ^ jnp.arange(block)[None]
    half = 1
    while half < block:
        product = grouped.contract(
            "bnrd,bnsd->bnrs",
            _weighted(rows, into.reshape(batch, -1, block, dh), dh),
            _weighted(columns, out.reshape(batch, -1, block, dh), dh),
        )
        pairs = (apart >= half) & (apart < 2 * half) & grouped.causal_mask(block, block)
        weights = jnp.where(pairs[:, None], product.reshape(weights.shape), weights)
        into, out = recurrent_chunks.double(into, out)
        half *= 2
    weights = weights.astype(v.dtype).reshape(batch, -1, block * groups, block)
    return into, out, grouped.contract("bnrs,bnsw->bnrw", weights, _blocks(v, block))


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[b, K, C, ...] -> [b, K C / size, size, the rest as one]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2] // size, size, -1)


def _weighted(x: jax.Array, decay: jax.Array, dh: int) -> jax.Array:
    """x [b, N, s, G dh] with decay [b, N, s, dh]: [b, N, s G, dh] in x's dtype, the rows of a matmul."""
    batch, blocks, size = decay.shape[:3]
    x = (x.reshape(batch, blocks, size, -1, dh) * decay[:, :, :, None]).astype(x.dtype)
    return x.reshape(batch, blocks, -1, dh)


def gated_linear_flops(
    length: int, heads: int, kv_heads: int, dh: int, dv: int, rows: int = 1, chunk: int = CHUNK
) -> float:
    """Matmul FLOPs of `gated_linear_attention`, forward, for one map that serves `rows` = Bv / Bq sequences.

    With C positions a chunk, c = min(16, C), w = rows dv, for each position (of whole chunks) and head: 2 dh w to read
    the state, (C - c) (dh + w) for the blocks below the diagonal, 2 c (log2(c) dh + w) for those on it; and 2 dh w for
    each kv head to add to the state.
    """
    if length == 1:
        return gated_linear_decode_flops(heads, kv_heads, dh, dv, rows)
    size, width = recurrent_chunks.chunk_size(chunk, length), rows * dv
    block = min(_BLOCK, size)
    levels = block.bit_length() - 1
    within = (size - block) * (dh + width) + 2 * block * (levels * dh + width)
    state = 2 * dh * width * (heads + kv_heads)
    return float(-(-length // size) * size * (state + within * heads))


def gated_linear_decode_flops(heads: int, kv_heads: int, dh: int, dv: int, rows: int = 1) -> float:
    """FLOPs of one more token for one map: q against the state, and the outer product added to it (which is
    element-wise, 2 dh w; that the state decays, dh w for each kv head, is not counted)."""
    return 2.0 * dh * rows * dv * (heads + kv_heads)
