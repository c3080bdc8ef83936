"""The self-gated running mean as a walk over chunks: one pass over q, k and v, and a running maximum on the chip.

    out_i = sum_{j<=i} exp(s_j) v_j / sum_{j<=i} exp(s_j),    s_j = silu(q_j) . k_j / sqrt(dh)

It moves bytes and does little arithmetic: what a chunk's positions have of each other is one small product.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.tpu import chunks
from deconstruct.kernels.tpu.chunks import Chunk, dot
from deconstruct.kernels.tpu.walk import walk

CHUNK = 128

_NEVER = -1e30  # below every score; finite, so that it may be subtracted from itself


class _State(NamedTuple):
    """Of one row, float32: for each of its G query heads, sums of exp(s - highest), alone and times v."""

    highest: jax.Array  # [1, G]
    sums: jax.Array  # [1, G]
    values: jax.Array  # [w, G]


def self_gate_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, chunk: int = CHUNK) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype; Bq is Bv or 1.

    `mask` may have documents, begins [Bq, L]; ValueError for a window. Scores, maxima and sums are float32. Any L.
    """
    mask.refuse_window("self_gate")
    batch, _, heads, _ = q.shape
    rows, groups = batch * k.shape[2], heads // k.shape[2]
    width = v.shape[0] // batch * v.shape[3]
    state = _State(
        jnp.full((rows, 1, groups), _NEVER, jnp.float32),
        jnp.zeros((rows, 1, groups), jnp.float32),
        jnp.zeros((rows, width, groups), jnp.float32),
    )
    _, out = walk(_step, state, chunks.cut(q, k, v, mask, chunk))
    return chunks.join_results(out, v, heads, batch)


def _step(state: _State, chunk: Chunk) -> tuple[_State, jax.Array]:
    size = chunk.k.shape[1]
    heads = [
        _one_head(chunk.q[:, g * size : (g + 1) * size], chunk, *(x[:, g : g + 1] for x in state))
        for g in range(chunk.q.shape[1] // size)
    ]
    out, *after = (x[0] if len(heads) == 1 else jnp.concatenate(x, axis=1) for x in zip(*heads, strict=True))
    return _State(*after), out


def _one_head(
    q: jax.Array, chunk: Chunk, highest: jax.Array, sums: jax.Array, values: jax.Array
) -> tuple[jax.Array, ...]:
    """out [w, C], and highest [1, 1], sums [1, 1] and values [w, 1] after the chunk."""
    _, k, v, begins = chunk
    dh, size = k.shape
    gated = jax.nn.silu(q.astype(jnp.float32)) * k.astype(jnp.float32)
    scores = dot(gated, jnp.ones((dh, 1), jnp.float32), 0, 0) * dh**-0.5  # [keys, 1]
    seen = chunks.causal(size)
    before = highest
    if begins is not None:
        seen &= jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) >= begins
        before = jnp.where(begins < 0, highest, _NEVER)
    # The maximum cancels in the quotient.
    shown = jnp.where(seen, jax.lax.stop_gradient(scores), _NEVER)
    top = jax.lax.stop_gradient(jnp.maximum(before, shown.max(0, keepdims=True)))  # [1, queries]
    weights = jnp.exp(jnp.where(seen, scores - top, _NEVER))
    decay = jnp.exp(before - top)
    sums = decay * sums + weights.sum(0, keepdims=True)
    values = decay * values + dot(v, weights.astype(v.dtype), 1, 0)
    return (values / sums).astype(v.dtype), top[:, -1:], sums[:, -1:], values[:, -1:]
