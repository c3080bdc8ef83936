"""The kernels of the self-gated running mean: a prefix sum over the values, and a suffix sum over the cotangents.

    out_i = sum_{j<=i} p_ij v_j,    p_ij = exp(s_j - n_i),    n_i = log sum_{j<=i} exp(s_j)
    D_j = sum_{i>=j} p_ij g_i,    ds_j = v_j . D_j - sum_{i>=j} p_ij (g_i . out_i)

A warpgroup walks along one head of one sequence, 64 positions at a time; memory, not arithmetic, is what it waits for.
Forward, all is relative to the running maximum; backward, to n, which does not fall along a sequence: no exponent is
above zero, whatever the scores. Between chunks a sum is carried as 64 equal rows: products make these, and take them
again, without a row ever having to be taken out of a product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deconstruct.kernels.gpu import tensor_core
from deconstruct.kernels.gpu.tensor_core import along_columns, along_rows, row_numbers

CHUNK = tensor_core.ROWS
LOG2E = math.log2(math.e)  # exponents are of two, the GPU's own: scores and n come times this
AHEAD = 4  # chunks on their way from memory at a time


class _ForwardScratch(NamedTuple):
    scores: Any
    v: Any
    sums: Any
    out: Any
    loaded: Any


def running_mean(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """scores float32 [Bq, H, L], v [Bv, L, K, dv] -> the means [Bv, L, H, dv], and n, float32 [Bv, H, L].

    Scores and n are times log2 e; L is a multiple of 64. Where Bq = 1 all rows of n are the same.
    """
    (batch, length, _, dv), heads = v.shape, scores.shape[1]
    scratch = _ForwardScratch(
        scores=plgpu.SMEM((AHEAD, CHUNK), jnp.float32),
        v=tensor_core.tiles(AHEAD, CHUNK, dv, dtype=v.dtype),
        sums=plgpu.SMEM((2, CHUNK), jnp.float32),
        out=tensor_core.tiles(2, CHUNK, dv, dtype=v.dtype),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
    )
    return plgpu.kernel(
        _running_mean,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, dv), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch_types=(scratch,),
        grid=(batch, heads),
        grid_names=("sequence", "head"),
        compiler_params=tensor_core.COMPILER,
    )(scores, v)


def _running_mean(scores: Any, v: Any, out: Any, sums: Any, scratch: _ForwardScratch) -> None:
    sequence, head = jax.lax.axis_index("sequence"), jax.lax.axis_index("head")
    kv_head = jax.lax.div(head, jnp.int32(scores.shape[1] // v.shape[2]))
    map_row = sequence if scores.shape[0] > 1 else 0
    chunks, dv = v.shape[1] // CHUNK, v.shape[-1]

    def load(chunk: Any, slot: Any) -> None:
        here, loaded = pl.ds(chunk * CHUNK, CHUNK), scratch.loaded.at[slot]
        plgpu.copy_gmem_to_smem(scores.at[map_row, head, here], scratch.scores.at[slot], loaded)
        plgpu.copy_gmem_to_smem(v.at[sequence, here, kv_head], scratch.v.at[slot], loaded)

    def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        border, past_sum, past = (
            carry  # the maximum before this chunk, and relative to it the sums, of weights and values
        )
        slot = jax.lax.rem(chunk, jnp.int32(AHEAD))
        plgpu.barrier_wait(scratch.loaded.at[slot])
        x, values = along_columns(scratch.scores.at[slot]), scratch.v.at[slot]

        def sums_to(highest: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights, decay = jnp.exp2(x - along_rows(highest, CHUNK)), jnp.exp2(border - highest)
            of_values = past * along_rows(decay, dv)
            of_values = tensor_core.add_products(of_values, (weights.astype(v.dtype), values))
            return past_sum * decay + weights.sum(axis=1), of_values

        seen = jnp.where(tensor_core.causal(jnp.int32(0), jnp.int32(0), CHUNK), x, -math.inf)
        highest = jnp.maximum(border, seen.max(axis=1))
        total, result = sums_to(highest, seen)
        place, here = jax.lax.rem(chunk, jnp.int32(2)), pl.ds(chunk * CHUNK, CHUNK)
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # what was written from there two steps ago has been read
        scratch.sums[place] = highest + jnp.log(total) * LOG2E
        scratch.out[place] = (result / along_rows(total, dv)).astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.sums.at[place], sums.at[sequence, head, here])
        plgpu.copy_smem_to_gmem(scratch.out.at[place], out.at[sequence, here, head])
        # What the next chunk starts from: all of this one, alike in all rows.
        highest = jnp.maximum(border, x.max(axis=1))
        past_sum, past = sums_to(highest, x)

        @pl.when(chunk + AHEAD < chunks)
        def _ahead() -> None:
            load(chunk + AHEAD, slot)

        return highest, past_sum, past

    for chunk in range(min(AHEAD, chunks)):
        load(chunk, chunk)
    start = tensor_core.of_rows(-math.inf), tensor_core.of_rows(0), tensor_core.zeros(dv)
    jax.lax.fori_loop(0, chunks, step, start)
    plgpu.wait_smem_to_gmem(0)


class _BackwardScratch(NamedTuple):
    numbers: Any
    means: Any
    v: Any
    g: Any
    dscores: Any
    dv: Any
    loaded: Any


def mean_gradients(numbers: jax.Array, v: jax.Array, g: jax.Array, means: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ds float32 [Bv, H, L] and D [Bv, L, H, dv], of each sequence and query head.

    numbers float32 [Bq, H, 2, L]: scores and n, times log2 e; v [Bv, L, K, dv]; g [Bv, L, H, dv], the cotangent of the
    means; means float32 [Bv, H, L]: g . out. L is a multiple of 64.
    """
    batch, _, heads, dv = g.shape
    scratch = _BackwardScratch(
        numbers=plgpu.SMEM((AHEAD, 2, CHUNK), jnp.float32),
        means=plgpu.SMEM((AHEAD, CHUNK), jnp.float32),
        v=tensor_core.tiles(AHEAD, CHUNK, dv, dtype=v.dtype),
        g=tensor_core.tiles(AHEAD, CHUNK, dv, dtype=v.dtype),
        dscores=plgpu.SMEM((2, CHUNK), jnp.float32),
        dv=tensor_core.tiles(2, CHUNK, dv, dtype=v.dtype),
        loaded=plgpu.Barrier(num_arrivals=4, num_barriers=AHEAD),
    )
    return plgpu.kernel(
        _mean_gradients,
        out_type=(jax.ShapeDtypeStruct(means.shape, jnp.float32), jax.ShapeDtypeStruct(g.shape, v.dtype)),
        scratch_types=(scratch,),
        grid=(batch, heads),
        grid_names=("sequence", "head"),
        compiler_params=tensor_core.COMPILER,
    )(numbers, v, g, means)


def _mean_gradients(numbers: Any, v: Any, g: Any, means: Any, dscores: Any, dv: Any, scratch: _BackwardScratch) -> None:
    sequence, head = jax.lax.axis_index("sequence"), jax.lax.axis_index("head")
    kv_head = jax.lax.div(head, jnp.int32(g.shape[2] // v.shape[2]))
    map_row = sequence if numbers.shape[0] > 1 else 0
    chunks, width = v.shape[1] // CHUNK, v.shape[-1]

    def load(step: Any, slot: Any) -> None:
        here, loaded = pl.ds((chunks - 1 - step) * CHUNK, CHUNK), scratch.loaded.at[slot]
        plgpu.copy_gmem_to_smem(numbers.at[map_row, head, :, here], scratch.numbers.at[slot], loaded)
        plgpu.copy_gmem_to_smem(means.at[sequence, head, here], scratch.means.at[slot], loaded)
        plgpu.copy_gmem_to_smem(v.at[sequence, here, kv_head], scratch.v.at[slot], loaded)
        plgpu.copy_gmem_to_smem(g.at[sequence, here, head], scratch.g.at[slot], loaded)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        border, future, future_means = carry
        slot = jax.lax.rem(index, jnp.int32(AHEAD))
        plgpu.barrier_wait(scratch.loaded.at[slot])
        # Keys stand down, queries across.
        scores, sums = row_numbers(scratch.numbers.at[slot, 0]), along_columns(scratch.numbers.at[slot, 1])
        first = -(-sums).max(axis=1)
        cotangents, of_queries = scratch.g.at[slot], along_columns(scratch.means.at[slot])
        weights = jnp.exp2(along_rows(scores, CHUNK) - sums)
        seen = tensor_core.causal(jnp.int32(0), jnp.int32(0), CHUNK, transposed=True)
        weights = jnp.where(seen, weights, 0).astype(v.dtype)
        later = jnp.exp2(scores - border)
        total = tensor_core.add_products(future * along_rows(later, width), (weights, cotangents))
        # Both terms of ds with the same rounded weights: where they cancel, so do the roundings.
        total_means = future_means * later + (weights.astype(jnp.float32) * of_queries).sum(axis=1)
        values = tensor_core.load_tile(scratch.v.at[slot]).astype(jnp.float32)
        place = jax.lax.rem(index, jnp.int32(2))
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # what was written from there two steps ago has been read
        scratch.dscores[place] = (values * total).sum(axis=1) - total_means
        scratch.dv[place] = total.astype(v.dtype)
        plgpu.commit_smem()
        here = pl.ds((chunks - 1 - index) * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(scratch.dscores.at[place], dscores.at[sequence, head, here])
        plgpu.copy_smem_to_gmem(scratch.dv.at[place], dv.at[sequence, here, head])
        weights = jnp.exp2(along_rows(first, CHUNK) - sums).astype(v.dtype)
        kept = jnp.exp2(first - border)
        future = tensor_core.add_products(future * along_rows(kept, width), (weights, cotangents))
        future_means = future_means * kept + (weights.astype(jnp.float32) * of_queries).sum(axis=1)

        @pl.when(index + AHEAD < chunks)
        def _ahead() -> None:
            load(index + AHEAD, slot)

        return first, future, future_means

    for index in range(min(AHEAD, chunks)):
        load(index, index)
    start = tensor_core.of_rows(math.inf), tensor_core.zeros(width), tensor_core.of_rows(0)
    jax.lax.fori_loop(0, chunks, step, start)
    plgpu.wait_smem_to_gmem(0)
