"""The kernels of the self-gated running mean: a prefix sum over the values, and a suffix sum over the cotangents.

    out_i = sum_{j<=i} p_ij v_j,    p_ij = exp(s_j - n_i),    n_i = log sum_{j<=i} exp(s_j)
    D_j = sum_{i>=j} p_ij g_i,    ds_j = v_j . D_j - sum_{i>=j} p_ij (g_i . out_i)

n does not fall along a sequence, so no exponent is above zero, whatever the scores. A warpgroup walks along one head of
one sequence, 64 positions at a time; memory, not arithmetic, is what it waits for. Between chunks it carries their sum
relative to the n of their border, as 64 equal rows: products make these, and take them again, without a row ever having
to be taken out of a product.
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
    numbers: Any
    v: Any
    out: Any
    loaded: Any


def running_mean(numbers: jax.Array, v: jax.Array) -> jax.Array:
    """numbers float32 [Bq, H, 2, L]: s and n, times log2 e; v [Bv, L, K, dv] -> [Bv, L, H, dv]. L a multiple of 64."""
    (batch, length, _, dv), heads = v.shape, numbers.shape[1]
    scratch = _ForwardScratch(
        numbers=plgpu.SMEM((AHEAD, 2, CHUNK), jnp.float32),
        v=tensor_core.tiles(AHEAD, CHUNK, dv, dtype=v.dtype),
        out=tensor_core.tiles(2, CHUNK, dv, dtype=v.dtype),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
    )
    return plgpu.kernel(
        _running_mean,
        out_type=jax.ShapeDtypeStruct((batch, length, heads, dv), v.dtype),
        scratch_types=(scratch,),
        grid=(batch, heads),
        grid_names=("sequence", "head"),
        compiler_params=tensor_core.COMPILER,
    )(numbers, v)


def _running_mean(numbers: Any, v: Any, out: Any, scratch: _ForwardScratch) -> None:
    sequence, head = jax.lax.axis_index("sequence"), jax.lax.axis_index("head")
    kv_head = jax.lax.div(head, jnp.int32(numbers.shape[1] // v.shape[2]))
    map_row = sequence if numbers.shape[0] > 1 else 0
    chunks, dv = v.shape[1] // CHUNK, v.shape[-1]

    def load(chunk: Any, slot: Any) -> None:
        here, loaded = pl.ds(chunk * CHUNK, CHUNK), scratch.loaded.at[slot]
        plgpu.copy_gmem_to_smem(numbers.at[map_row, head, :, here], scratch.numbers.at[slot], loaded)
        plgpu.copy_gmem_to_smem(v.at[sequence, here, kv_head], scratch.v.at[slot], loaded)

    def step(chunk: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        border, past = carry
        slot = jax.lax.rem(chunk, jnp.int32(AHEAD))
        plgpu.barrier_wait(scratch.loaded.at[slot])
        scores, sums = along_columns(scratch.numbers.at[slot, 0]), row_numbers(scratch.numbers.at[slot, 1])
        last = along_columns(scratch.numbers.at[slot, 1]).max(axis=1)
        values = scratch.v.at[slot]
        weights = jnp.exp2(scores - along_rows(sums, CHUNK))
        weights = jnp.where(tensor_core.causal(jnp.int32(0), jnp.int32(0), CHUNK), weights, 0).astype(v.dtype)
        result = tensor_core.add_products(past * along_rows(jnp.exp2(border - sums), dv), (weights, values))
        weights = jnp.exp2(scores - along_rows(last, CHUNK)).astype(v.dtype)
        past = tensor_core.add_products(past * along_rows(jnp.exp2(border - last), dv), (weights, values))
        place = jax.lax.rem(chunk, jnp.int32(2))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was written from there two steps ago has been read
        scratch.out[place] = result.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out.at[place], out.at[sequence, pl.ds(chunk * CHUNK, CHUNK), head])

        @pl.when(chunk + AHEAD < chunks)
        def _ahead() -> None:
            load(chunk + AHEAD, slot)

        return last, past

    for chunk in range(min(AHEAD, chunks)):
        load(chunk, chunk)
    jax.lax.fori_loop(0, chunks, step, (tensor_core.of_rows(-math.inf), tensor_core.zeros(dv)))
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

    As for `running_mean`; g [Bv, L, H, dv] is the cotangent of its results, and means float32 [Bv, H, L] are g . out.
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
