"""The forward kernel of pairwise forms: one block of queries, all blocks of keys that it sees.

A block of queries is 128 rows, 64 for each warpgroup that computes. It passes over the keys from the first to its own,
and holds in registers the sums of weights times values of `shared` sequences that have one map: the logits are formed
once for all of these. Nothing is written but the results, and one number for each row.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deconstruct.kernels.gpu import pipeline, tensor_core
from deconstruct.kernels.gpu.pipeline import BLOCK
from deconstruct.kernels.gpu.tensor_core import ROWS
from deconstruct.kernels.gpu.weighing import Weighing


class _Scratch(NamedTuple):
    q: Any
    k: Any
    v: Any
    out: Any
    kept: Any
    q_loaded: Any
    ring: pipeline.Ring


def forward(q: jax.Array, k: jax.Array, v: jax.Array, weighing: Weighing, shared: int) -> tuple[jax.Array, jax.Array]:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype, and `kept` [Bq, H, L].

    L is a multiple of 128. `shared` sequences of the Bv are mixed by one map: 1 where Bq = Bv, a divisor of Bv where
    Bq = 1.
    """
    qk_batch, length, heads, dh = q.shape
    batch, dv = v.shape[0], v.shape[3]
    keys = 128 if shared * dv <= 128 else 64  # a block of them: what the sums leave of the registers
    two, stages = pipeline.COMPUTING, pipeline.STAGES
    scratch = _Scratch(
        q=tensor_core.tiles(two, ROWS, dh, dtype=q.dtype),
        k=tensor_core.tiles(stages, keys, dh, dtype=k.dtype),
        v=tensor_core.tiles(stages * shared, keys, dv, dtype=v.dtype),
        out=tensor_core.tiles(two, ROWS, dv, dtype=v.dtype),
        kept=plgpu.SMEM((two, ROWS), jnp.float32),
        q_loaded=plgpu.Barrier(num_barriers=two),
        ring=pipeline.ring(copies=1 + pipeline.Sequences(0, shared).copies(dv)),
    )

    def pairwise_forward(*refs: Any) -> None:
        _kernel(weighing, shared, *refs)

    out, kept = plgpu.kernel(
        pairwise_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, dv), v.dtype),
            jax.ShapeDtypeStruct((batch // shared, heads, length), jnp.float32),
        ),
        scratch_types=(scratch,),
        # Blocks of one head follow one another, so that its keys and values are read from the L2 cache.
        grid=(batch // shared, heads, length // BLOCK),
        grid_names=("group", "head", "block"),
        num_threads=two + 1,
        thread_name=pipeline.WARPGROUP,
        compiler_params=tensor_core.COMPILER,
    )(q, k, v)
    return out, kept[:qk_batch]


def _kernel(weighing: Weighing, shared: int, q: Any, k: Any, v: Any, out: Any, kept: Any, scratch: _Scratch) -> None:
    group, head = jax.lax.axis_index("group"), jax.lax.axis_index("head")
    kv_head = jax.lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
    map_row = group if q.shape[0] > 1 else 0
    # The longest first, so that the last to start is among the shortest.
    block = q.shape[1] // BLOCK - 1 - jax.lax.axis_index("block")
    keys, dh = scratch.k.shape[1:]
    dv = v.shape[-1]
    clear = block * (BLOCK // keys)  # steps in which all queries see all keys
    steps = clear + BLOCK // keys

    def load(_: jax.Array, step: jax.Array, slot: jax.Array) -> None:
        here, loaded = pl.ds(step * keys, keys), scratch.ring.loaded.at[slot]
        plgpu.copy_gmem_to_smem(k.at[map_row, here, kv_head], scratch.k.at[slot], loaded)
        pipeline.Sequences(group * shared, shared).fetch(v, here, kv_head, scratch.v, slot, loaded)

    def compute(warpgroup: jax.Array) -> None:
        first = block * BLOCK + warpgroup * ROWS
        here = pl.ds(first, ROWS)
        queries, results, number = (x.at[warpgroup] for x in (scratch.q, scratch.out, scratch.kept))
        plgpu.copy_gmem_to_smem(q.at[map_row, here, head], queries, scratch.q_loaded.at[warpgroup])
        plgpu.barrier_wait(scratch.q_loaded.at[warpgroup])

        def step(at_diagonal: bool, index: jax.Array, carry: Any) -> Any:
            rows, sums = carry
            slot = pipeline.slot_of(index)
            plgpu.barrier_wait(scratch.ring.loaded.at[slot])
            x = tensor_core.product(queries, tensor_core.transposed(scratch.k.at[slot])) * dh**-0.5
            seen = tensor_core.causal(first, index * keys, keys) if at_diagonal else None
            weights, decay, rows = weighing.weigh(x, seen, rows)
            if decay is not None:
                sums = tuple(part * tensor_core.along_rows(decay, dv) for part in sums)
            weights = weights.astype(v.dtype)
            sums = tuple(
                tensor_core.add_products(part, (weights, scratch.v.at[slot * shared + i]))
                for i, part in enumerate(sums)
            )
            plgpu.barrier_arrive(scratch.ring.used.at[slot])
            return rows, sums

        carry = weighing.start(), tuple(tensor_core.zeros(dv) for _ in range(shared))
        carry = jax.lax.fori_loop(0, clear, functools.partial(step, False), carry)
        rows, sums = jax.lax.fori_loop(clear, steps, functools.partial(step, True), carry)
        total, number[...] = weighing.finish(rows)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(number, kept.at[group, head, here])
        for i, part in enumerate(sums):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            results[...] = (part / tensor_core.along_rows(total, dv)).astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(results, out.at[group * shared + i, here, head])
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(compute, load, scratch.ring, steps)
