"""The self-gated running mean in linear time, by a prefix softmax that carries its own maximum.

    out_i = sum_{j<=i} exp(s_j) v_j / sum_{j<=i} exp(s_j),    s_j = silu(q_j) . k_j / sqrt(dh)

(the "non-approximate" form of arXiv:2510.11602: no similarity between positions). The scores reach +-1e3 and more, so
all is kept relative to the running maximum m_i: every denominator is then at least one. The maximum cancels in the
quotient and takes no part in the derivative. With documents the mean begins anew at each, and so does the maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels import grouped, reference
from deconstruct.kernels.mask import CAUSAL, Mask, cut_begins

CHUNK = 64


class SelfGateState(NamedTuple):
    """The document so far, float32 (float64 for float64 inputs): sums of exp(s - highest), alone and times v."""

    highest: jax.Array  # [Bq, H], -inf before the first position
    sums: jax.Array  # [Bq, H]
    values: jax.Array  # [Bv, H, dv]


def init_self_gate_state(
    qk_batch: int, batch: int, heads: int, dv: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> SelfGateState:
    """The state before the first position. `qk_batch` is Bq, `batch` is Bv, `heads` the query heads."""
    return SelfGateState(
        highest=jnp.full((qk_batch, heads), -jnp.inf, dtype),
        sums=jnp.zeros((qk_batch, heads), dtype),
        values=jnp.zeros((batch, heads, dv), dtype),
    )


def self_gate_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: SelfGateState | None = None,
    chunk: int = CHUNK,
    mask: Mask = CAUSAL,
) -> tuple[jax.Array, SelfGateState]:
    """The running mean of the values, weighted by exp(s).

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype, and the state after them; a
    sequence is extended by another call with that state. Within a chunk the prefix sums are one small matmul, all
    chunks at once; only the totals of the chunks go through a scan. Where the first document of the mask began before
    these positions (`begins` < 0), it is the one that the state is of; the state after them is of the last document.
    ValueError for a window, and for `begins` not of shape [Bq, L].
    """
    mask.refuse_window("self_gate")
    begins = mask.begins_of(q)
    batch, length, heads, _ = q.shape
    kv_heads, dv = v.shape[2:]
    dtype = grouped.accumulation_dtype(q, k, v)
    if state is None:
        state = init_self_gate_state(batch, v.shape[0], heads, dv, dtype)
    size = min(chunk, length)
    head_axes = (kv_heads, heads // kv_heads)
    scores = reference.gate_scores(q, k).reshape(batch, *head_axes, length)
    scores = jnp.moveaxis(grouped.cut(scores, 3, size, fill=-jnp.inf), 3, 2)  # b k t g s
    values = grouped.cut(grouped.split_values(v, batch), 2, size)  # b k t s n e
    # w = rows x dv and, in the matmul, r = groups x positions: six axes are the most there are. A product of arrays
    # of seven axes, summed over the fifth, as the gradient of `decay * past` was, ends the process on CPUs that have
    # AVX2 without AVX-512 (XLA's YNNPACK fusions, jax 0.10.2).
    values = values.reshape(*values.shape[:4], -1)
    own = grouped.split_rows(state.values, batch)
    own = own.reshape(*own.shape[:2], *head_axes, dv).transpose(0, 2, 3, 1, 4).reshape(batch, *head_axes, -1)
    own_highest = state.highest.reshape(batch, *head_axes)
    if begins is None:
        seen = grouped.causal_mask(size, size)
        before, highest = _running_maximum(scores, own_highest)
    else:
        borders = cut_begins(begins, size)
        seen = grouped.causal_mask(size, size)[None, None]
        seen &= jnp.arange(size)[None, None, None, :] >= borders[..., None]  # b t l s
        before, highest = _maximum_of_documents(scores, own_highest, borders, seen)
        seen = seen[:, None, :, None]  # b 1 t 1 l s
    decay = jnp.exp(before - highest)
    weights = jnp.exp(jnp.where(seen, scores[..., None, :] - highest[..., :, None], -jnp.inf))  # b k t g l s
    sums = weights.sum(-1)
    flat = weights.astype(v.dtype).reshape(*weights.shape[:3], -1, size)
    within = grouped.contract("bktrs,bktsw->bktrw", flat, values).reshape(*sums.shape, -1)  # b k t g l w
    carry = (state.sums.reshape(batch, *head_axes), own)
    # The last row of a chunk holds the chunk's totals, relative to the maximum up to there.
    steps = (decay[..., -1], sums[..., -1], within[..., -1, :])
    (last_sums, last_values), (past_sums, past_values) = jax.lax.scan(
        _next_chunk, carry, tuple(jnp.moveaxis(x, 2, 0) for x in steps)
    )
    sums += decay * jnp.moveaxis(past_sums, 0, 2)[..., None]
    within += decay[..., None] * jnp.moveaxis(past_values, 0, 2)[..., None, :]
    out = jnp.moveaxis((within / sums[..., None]).astype(v.dtype), 2, 3)  # b k g t l w
    out = grouped.join(out, 3, length).reshape(batch, *head_axes, length, -1, dv)
    last_values = last_values.reshape(batch, *head_axes, -1, dv)
    return grouped.merge_results(out), SelfGateState(
        highest=highest[:, :, -1, :, -1].reshape(batch, heads),
        sums=last_sums.reshape(batch, heads),
        values=last_values.transpose(0, 3, 1, 2, 4).reshape(v.shape[0], heads, dv),
    )


def _running_maximum(scores: jax.Array, highest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of scores [b, k, t, g, s], the maximum before each chunk [b, k, t, g, 1] and up to each position. Not
    differentiated."""
    scores, highest = jax.lax.stop_gradient((scores, highest))
    within = jax.lax.cummax(scores, axis=4)
    before = jnp.concatenate([highest[:, :, None], within[:, :, :-1, :, -1]], axis=2)
    before = jax.lax.cummax(before, axis=2)[..., None]
    return before, jnp.maximum(before, within)


def _maximum_of_documents(
    scores: jax.Array, highest: jax.Array, begins: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_running_maximum`, of each position's own document: begins [b, t, l], seen [b, t, l, s]. The maximum before
    the chunk is [b, k, t, g, l], -inf where the position's document began in it."""
    scores, highest = jax.lax.stop_gradient((scores, highest))
    within = jnp.where(seen[:, None, :, None], scores[..., None, :], -jnp.inf).max(-1)
    goes_on = begins < 0

    def step(carry: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last_goes_on, last = chunk
        return jnp.maximum(jnp.where(last_goes_on[:, None, None], carry, -jnp.inf), last), carry

    _, before = jax.lax.scan(step, highest, (goes_on[:, :, -1].T, jnp.moveaxis(within[..., -1], 2, 0)))
    before = jnp.where(goes_on[:, None, :, None], jnp.moveaxis(before, 0, 2)[..., None], -jnp.inf)
    return before, jnp.maximum(before, within)


def _next_chunk(
    carry: tuple[jax.Array, jax.Array], step: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    sums, values = carry
    decay, chunk_sums, chunk_values = step
    return (sums * decay + chunk_sums, values * decay[..., None] + chunk_values), carry
