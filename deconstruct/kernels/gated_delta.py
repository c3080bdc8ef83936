"""The gated delta rule (Gated DeltaNet, Yang et al. 2025, arXiv:2412.06464): a memory that corrects what it holds.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    out_t = q_t S_t / sqrt(dh),    a_t = exp(g_t)

with q_t and k_t of unit length, brought to it here (`recurrences.unit`): the decay acts first, and what is written is
beta_t (v_t - k_t a_t S_{t-1}), the part of the value that the decayed memory does not yet give for this key. Within a
chunk those corrections u depend on each other, by a unit lower triangle (the WY form), with c_ij = a_{j+1} .. a_i:

    (I + N) U = beta (V - c K S_0),    N_ij = beta_i (k_i . k_j) c_ij for j < i
    out_i = (c_i q_i S_0 + sum_{j<=i} (q_i . k_j) c_ij u_j) / sqrt(dh),    S = c S_0 + sum_j c_j k_j u_j^T

c_ij is the exponential of a sum that is formed for each pair, not of a difference of two sums. I + N is inverted by
forward substitution, float32, in blocks; decays, sums and the state are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped, recurrences, recurrent_chunks
from deconstruct.kernels.mask import CAUSAL, Mask

# On a CPU a third faster than 64: most of the work there is in what grows with the chunk.
CHUNK = 32

# Diagonal blocks of this size are inverted row by row, larger ones out of their quarters, by matmuls.
_BLOCK = 8


class GatedDeltaState(NamedTuple):
    """S after the positions so far, float32 (float64 for float64 inputs), without the scale.

    Laid out like a `KVCache`, so that a decoded token updates it in place: Bq K counts sequences and kv heads,
    w = (Bv / Bq) dv.
    """

    s: jax.Array  # [Bq K, dh, w]


def init_gated_delta_state(
    qk_batch: int, batch: int, kv_heads: int, dh: int, dv: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> GatedDeltaState:
    """The state before the first position: zero. `qk_batch` is Bq, `batch` is Bv."""
    return GatedDeltaState(jnp.zeros((qk_batch * kv_heads, dh, batch // qk_batch * dv), dtype))


def gated_delta_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array,
    beta: jax.Array,
    state: GatedDeltaState | None = None,
    mask: Mask = CAUSAL,
    chunk: int = CHUNK,
) -> tuple[jax.Array, GatedDeltaState]:
    """The gated delta rule over a whole sequence, or over the next piece of one.

    q [Bq, L, H, dh] and k [Bq, L, K, dh] of any length, v [Bv, L, K, dv], log_decay [Bq, L, K] (g <= 0, of any size),
    beta [Bq, L, K] in [0, 1] -> [Bv, L, H, dv] in v's dtype, and the state after them; a sequence is extended by
    another call with that state. Bq is Bv or 1. `mask` may have documents (then Bq is Bv); ValueError for a window.
    Any L: what is padded has keys of zero, and a decay of one. A `chunk` is rounded up to a power of two.
    """
    batch, length, _, dh = q.shape
    kv_heads, dv = v.shape[2:]
    exact = grouped.accumulation_dtype(q, k, v)
    log_decay = recurrent_chunks.with_borders(log_decay.astype(exact), mask, batch, v.shape[0])
    if state is None:
        state = init_gated_delta_state(batch, v.shape[0], kv_heads, dh, dv, exact)
    size = recurrent_chunks.chunk_size(chunk, length)
    chunks = (
        recurrent_chunks.cut_queries(recurrences.unit(q).astype(q.dtype), kv_heads, size),
        recurrent_chunks.cut_keys(recurrences.unit(k).astype(k.dtype), size),
        recurrent_chunks.cut_values(v, batch, size),
        recurrent_chunks.cut_keys(log_decay, size),
        recurrent_chunks.cut_keys(beta.astype(exact), size),
    )
    if length == 1:
        s, out = _single(state.s, *(x.reshape(-1, *x.shape[4:]) for x in chunks))
        out = out.reshape(1, batch, kv_heads, 1, *out.shape[1:])
    else:
        s = state.s.reshape(batch, kv_heads, *state.s.shape[1:])
        s, out = jax.lax.scan(jax.checkpoint(_step, prevent_cse=False), s, chunks)
        s = s.reshape(state.s.shape)
    return recurrent_chunks.join_results(out, length, dv), GatedDeltaState(s)


def _single(
    s: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One position, q [z, G, dh], k [z, dh], v [z, w], log_decay and beta [z], read out of the state after it,
    [z, dh, w], which is thus updated in place. All in the dtype of the state."""
    exact = s.dtype
    k, decay = k.astype(exact), jnp.exp(log_decay)[:, None]
    held = decay * grouped.contract("zd,zdw->zw", k, s)
    written = beta[:, None] * (v.astype(exact) - held)
    s = decay[..., None] * s + k[:, :, None] * written[:, None]
    out = grouped.contract("zgd,zdw->zgw", q.astype(exact), s)
    return s, (out * q.shape[-1] ** -0.5).astype(v.dtype)


def _step(s: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """One chunk, q [b, K, C, G, dh], k [b, K, C, dh], v [b, K, C, w], log_decay and beta [b, K, C]: the state
    [b, K, dh, w] after it, and what it reads [b, K, C, G, w] from itself and from the state before."""
    q, k, v, log_decay, beta = chunk
    inverse, weights, into, kept = by_themselves(q, k, log_decay, beta)
    rows, past = q.reshape(*q.shape[:2], -1, q.shape[-1]), s.astype(k.dtype)
    missing = v.astype(s.dtype) - into[..., None] * grouped.contract("bksd,bkdw->bksw", k, past)
    written = grouped.contract("bkij,bkjw->bkiw", inverse, (beta[..., None] * missing).astype(v.dtype)).astype(v.dtype)
    out = read(weights, into, written, grouped.contract("bkrd,bkdw->bkrw", rows, past))
    s = into[..., -1, None, None] * s + grouped.contract("bksd,bksw->bkdw", kept, written)
    return s, (out * q.shape[-1] ** -0.5).astype(v.dtype)


def by_themselves(
    q: jax.Array, k: jax.Array, log_decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What chunks are without the state before them: (I + N)^-1 [b, K, C, C], the weights of what they read from their
    corrections [b, K, C G, C], the decays into them [b, K, C], and the keys [b, K, C, dh] that are added to the state.

    q [b, K, C, G, dh] and k [b, K, C, dh] of unit length, log_decay and beta [b, K, C].
    """
    batch, kv_heads, size, groups, dh = q.shape
    between = _between(log_decay)
    into, out = jnp.exp(jnp.cumsum(log_decay, axis=-1)), between[..., -1, :]
    overlap = grouped.contract("bkid,bkjd->bkij", k, k) * between
    inverse = _inverse(jnp.where(jnp.tri(size, k=-1, dtype=bool), beta[..., None] * overlap, 0))
    weights = grouped.contract("bkrd,bksd->bkrs", q.reshape(batch, kv_heads, -1, dh), k)
    weights = weights.reshape(batch, kv_heads, size, groups, size) * between[:, :, :, None]
    weights = weights.astype(q.dtype).reshape(batch, kv_heads, -1, size)
    return inverse.astype(q.dtype), weights, into, (k * out[..., None]).astype(k.dtype)


def read(weights: jax.Array, into: jax.Array, written: jax.Array, before: jax.Array) -> jax.Array:
    """What chunks read, [b, K, C, G, w], without the scale: from their corrections, `written` [b, K, C, w], and from
    `before` [b, K, C G, w], q times the state before them."""
    shape = (*into.shape, -1, written.shape[-1])
    within = grouped.contract("bkrs,bksw->bkrw", weights, written)
    return within.reshape(shape) + into[..., None, None] * before.reshape(shape)


def _between(log_decay: jax.Array) -> jax.Array:
    """c_ij = exp(sum_{j<m<=i} g_m) for j <= i, else zero: [..., C] -> [..., i, j]. Each sum has its own terms only."""
    size = log_decay.shape[-1]
    after = jnp.tri(size, k=-1, dtype=bool)  # m after j
    sums = jnp.cumsum(jnp.where(after, log_decay[..., :, None], 0), axis=-2)
    return jnp.where(grouped.causal_mask(size, size), jnp.exp(sums), 0)


def _inverse(n: jax.Array) -> jax.Array:
    """(I + n)^-1 for n [b, K, C, C] with nothing on and above its diagonal, by forward substitution in blocks.

    Not by the series in powers of -n, which is as exact on paper: its terms grow like binomials where keys repeat.
    """
    size = n.shape[-1]
    block = min(_BLOCK, size)
    inverse = _invert_rows(jnp.stack([n[..., i : i + block, i : i + block] for i in range(0, size, block)], axis=2))
    while block < size:
        below = jnp.stack(
            [n[..., i + block : i + 2 * block, i : i + block] for i in range(0, size, 2 * block)], axis=2
        ).reshape(n.shape[0], -1, block, block)
        first, second = (x.reshape(below.shape) for x in (inverse[:, :, 0::2], inverse[:, :, 1::2]))
        corner = -grouped.exactly("bnij,bnjl->bnil", second, grouped.exactly("bnij,bnjl->bnil", below, first))
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
        inverse = inverse.reshape(*n.shape[:2], -1, block, block)
    return inverse[:, :, 0]


def _invert_rows(n: jax.Array) -> jax.Array:
    """The same for small blocks [..., s, s], row by row: row i is e_i - sum_{j<i} n_ij row_j."""
    size = n.shape[-1]
    units = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    rows = units[..., :1, :]
    for i in range(1, size):
        row = units[..., i : i + 1, :] - (n[..., i, :i, None] * rows).sum(-2, keepdims=True)
        rows = jnp.concatenate([rows, row], axis=-2)
    return rows


def gated_delta_flops(
    length: int, heads: int, kv_heads: int, dh: int, dv: int, rows: int = 1, chunk: int = CHUNK
) -> float:
    """Matmul FLOPs of `gated_delta_attention`, forward, for one map that serves `rows` = Bv / Bq sequences.

    With C positions a chunk, w = rows dv, for each position (of whole chunks): 2 dh w for each head and twice that for
    each kv head between the state and q, k and the corrections; 2 C (dh + w) for each head, within the chunk, and as
    much for each kv head (k k^T, and the inverse applied); and the inverse, 2 s^2 for s = 8, 16, .. C / 2. The s = 8
    blocks' rows are element-wise, and not counted.
    """
    if length == 1:
        return gated_delta_decode_flops(heads, kv_heads, dh, dv, rows)
    size, width = recurrent_chunks.chunk_size(chunk, length), rows * dv
    inverse, block = 0, _BLOCK
    while block < size:
        inverse += 2 * block**2
        block *= 2
    state = 2 * dh * width * (heads + 2 * kv_heads)
    within = 2 * size * (dh + width) * (heads + kv_heads)
    return float(-(-length // size) * size * (state + within + inverse * kv_heads))


def gated_delta_decode_flops(heads: int, kv_heads: int, dh: int, dv: int, rows: int = 1) -> float:
    """FLOPs of one more token for one map: k and q against the state, and the outer product added to it (which is
    element-wise, 2 dh w; that the state decays, dh w for each kv head, is not counted)."""
    return 2.0 * dh * rows * dv * (heads + 2 * kv_heads)
