"""The backward kernels of pairwise forms. Both form the weights again, from the logits and one number a row.

    dL/dx_ij = u_ij (g_i . v_j - g_i . out_i) / n_i,    u = dw/dx,    n_i = sum_{j<=i} w_ij

One kernel has a block of queries and passes over the keys it sees, for dq; the other has a block of keys and passes
over the queries that see it, for dk and dv. Sums over sequences that share a map are linear in them, so each group of
`shared` sequences gives a part of dq and dk.
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
from deconstruct.kernels.gpu.tensor_core import ROWS, transposed
from deconstruct.kernels.gpu.weighing import Weighing

STEP = 64  # positions of the other side, at a time


class Given(NamedTuple):
    """What both kernels read."""

    q: Any  # [Bq, L, H, dh]
    k: Any  # [Bq, L, K, dh]
    v: Any  # [Bv, L, K, dv]
    g: Any  # [Bv, L, H, dv]: the cotangent of the results
    numbers: Any  # float32 [groups, H, 2, L]: `kept` of the forward pass, and the group's sum of g_i . out_i

    @property
    def groups(self) -> int:
        return self.numbers.shape[0]

    @property
    def shared(self) -> int:
        return self.v.shape[0] // self.numbers.shape[0]

    @property
    def heads_a_key(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def map_row(self, group: jax.Array) -> Any:
        return group if self.q.shape[0] > 1 else 0


class _QueryScratch(NamedTuple):
    q: Any
    g: Any
    numbers: Any
    k: Any
    v: Any
    mine: Any
    ring: pipeline.Ring


def query_gradients(given: Given, weighing: Weighing) -> jax.Array:
    """dq, a part from each group: [groups, L, H, dh], in q's dtype."""
    (_, length, heads, dh), dv, shared = given.q.shape, given.v.shape[-1], given.shared
    two, stages, dtype = pipeline.COMPUTING, pipeline.STAGES, given.q.dtype
    copies = pipeline.Sequences(0, shared).copies(dv)
    scratch = _QueryScratch(
        q=tensor_core.tiles(two, ROWS, dh, dtype=dtype),
        g=tensor_core.tiles(two * shared, ROWS, dv, dtype=dtype),
        numbers=plgpu.SMEM((two, 2, ROWS), jnp.float32),
        k=tensor_core.tiles(stages, STEP, dh, dtype=dtype),
        v=tensor_core.tiles(stages * shared, STEP, dv, dtype=dtype),
        mine=plgpu.Barrier(num_arrivals=2 + copies, num_barriers=two),
        ring=pipeline.ring(copies=1 + copies),
    )

    def pairwise_query_gradients(*refs: Any) -> None:
        _query_kernel(weighing, Given(*refs[: len(given)]), *refs[len(given) :])

    return plgpu.kernel(
        pairwise_query_gradients,
        out_type=jax.ShapeDtypeStruct((given.groups, length, heads, dh), dtype),
        scratch_types=(scratch,),
        grid=(given.groups, heads, length // BLOCK),
        grid_names=("group", "head", "block"),
        num_threads=two + 1,
        thread_name=pipeline.WARPGROUP,
        compiler_params=tensor_core.COMPILER,
    )(*given)


def _query_kernel(weighing: Weighing, given: Given, dq: Any, scratch: _QueryScratch) -> None:
    group, head = jax.lax.axis_index("group"), jax.lax.axis_index("head")
    kv_head = jax.lax.div(head, jnp.int32(given.heads_a_key))
    map_row, shared, dh = given.map_row(group), given.shared, given.q.shape[-1]
    sequences = pipeline.Sequences(group * shared, shared)
    block = given.q.shape[1] // BLOCK - 1 - jax.lax.axis_index("block")  # the longest first
    clear = block * (BLOCK // STEP)
    steps = clear + BLOCK // STEP

    def load(_: jax.Array, step: jax.Array, slot: jax.Array) -> None:
        here, loaded = pl.ds(step * STEP, STEP), scratch.ring.loaded.at[slot]
        plgpu.copy_gmem_to_smem(given.k.at[map_row, here, kv_head], scratch.k.at[slot], loaded)
        sequences.fetch(given.v, here, kv_head, scratch.v, slot, loaded)

    def compute(warpgroup: jax.Array) -> None:
        first = block * BLOCK + warpgroup * ROWS
        here, mine = pl.ds(first, ROWS), scratch.mine.at[warpgroup]
        q, g = scratch.q.at[warpgroup], [scratch.g.at[warpgroup * shared + i] for i in range(shared)]
        plgpu.copy_gmem_to_smem(given.q.at[map_row, here, head], q, mine)
        sequences.fetch(given.g, here, head, scratch.g, warpgroup, mine)
        plgpu.copy_gmem_to_smem(given.numbers.at[group, head, :, here], scratch.numbers.at[warpgroup], mine)
        plgpu.barrier_wait(mine)
        kept, means = (tensor_core.row_numbers(scratch.numbers.at[warpgroup, i]) for i in (0, 1))

        def step(at_diagonal: bool, index: jax.Array, sums: jax.Array) -> jax.Array:
            slot = pipeline.slot_of(index)
            plgpu.barrier_wait(scratch.ring.loaded.at[slot])
            keys = scratch.k.at[slot]
            x = tensor_core.product(q, transposed(keys)) * dh**-0.5
            pairs = [(g[i], transposed(scratch.v.at[slot * shared + i])) for i in range(shared)]
            dw = tensor_core.add_products(tensor_core.along_rows(-means, STEP), *pairs)
            _, slope = weighing.again(x, tensor_core.along_rows(kept, STEP))
            dx = slope * dw
            if at_diagonal:
                dx = jnp.where(tensor_core.causal(first, index * STEP, STEP), dx, 0)
            sums = tensor_core.add_products(sums, (dx.astype(keys.dtype), keys))
            plgpu.barrier_arrive(scratch.ring.used.at[slot])
            return sums

        sums = jax.lax.fori_loop(0, clear, functools.partial(step, False), tensor_core.zeros(dh))
        sums = jax.lax.fori_loop(clear, steps, functools.partial(step, True), sums)
        q[...] = (sums * dh**-0.5).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq.at[group, here, head])
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(compute, load, scratch.ring, steps)


class _KeyScratch(NamedTuple):
    k: Any
    v: Any
    q: Any
    g: Any
    numbers: Any
    mine: Any
    ring: pipeline.Ring


def key_and_value_gradients(given: Given, weighing: Weighing) -> tuple[jax.Array, jax.Array]:
    """dk, a part from each group: [groups, L, K, dh], and dv [Bv, L, K, dv], in the dtypes of k and v."""
    (_, length, kv_heads, dh), dv, shared = given.k.shape, given.v.shape[-1], given.shared
    two, stages, dtype = pipeline.COMPUTING, pipeline.STAGES, given.k.dtype
    copies = pipeline.Sequences(0, shared).copies(dv)
    scratch = _KeyScratch(
        k=tensor_core.tiles(two, ROWS, dh, dtype=dtype),
        v=tensor_core.tiles(two * shared, ROWS, dv, dtype=dtype),
        q=tensor_core.tiles(stages, STEP, dh, dtype=dtype),
        g=tensor_core.tiles(stages * shared, STEP, dv, dtype=dtype),
        numbers=plgpu.SMEM((stages, 2, STEP), jnp.float32),
        mine=plgpu.Barrier(num_arrivals=1 + copies, num_barriers=two),
        ring=pipeline.ring(copies=2 + copies),
    )

    def pairwise_key_gradients(*refs: Any) -> None:
        _key_kernel(weighing, Given(*refs[: len(given)]), *refs[len(given) :])

    return plgpu.kernel(
        pairwise_key_gradients,
        out_type=(
            jax.ShapeDtypeStruct((given.groups, length, kv_heads, dh), dtype),
            jax.ShapeDtypeStruct(given.v.shape, dtype),
        ),
        scratch_types=(scratch,),
        grid=(given.groups, kv_heads, length // BLOCK),  # the longest come first by themselves
        grid_names=("group", "head", "block"),
        num_threads=two + 1,
        thread_name=pipeline.WARPGROUP,
        compiler_params=tensor_core.COMPILER,
    )(*given)


def _key_kernel(weighing: Weighing, given: Given, dk: Any, dv: Any, scratch: _KeyScratch) -> None:
    group, kv_head, block = (jax.lax.axis_index(name) for name in ("group", "head", "block"))
    map_row, shared, heads = given.map_row(group), given.shared, given.heads_a_key
    dh, width, sequences = given.q.shape[-1], given.v.shape[-1], pipeline.Sequences(group * shared, shared)
    # Of each head that reads these keys: the blocks of queries that see them, of which the first are at the diagonal.
    steps, at_diagonal = (given.q.shape[1] - block * BLOCK) // STEP, BLOCK // STEP

    def load(of_these: jax.Array, step: jax.Array, slot: jax.Array) -> None:
        head, here = kv_head * heads + of_these, pl.ds(block * BLOCK + step * STEP, STEP)
        loaded = scratch.ring.loaded.at[slot]
        plgpu.copy_gmem_to_smem(given.q.at[map_row, here, head], scratch.q.at[slot], loaded)
        sequences.fetch(given.g, here, head, scratch.g, slot, loaded)
        plgpu.copy_gmem_to_smem(given.numbers.at[group, head, :, here], scratch.numbers.at[slot], loaded)

    def compute(warpgroup: jax.Array) -> None:
        first = block * BLOCK + warpgroup * ROWS
        here, mine = pl.ds(first, ROWS), scratch.mine.at[warpgroup]
        k, v = scratch.k.at[warpgroup], [scratch.v.at[warpgroup * shared + i] for i in range(shared)]
        plgpu.copy_gmem_to_smem(given.k.at[map_row, here, kv_head], k, mine)
        sequences.fetch(given.v, here, kv_head, scratch.v, warpgroup, mine)
        plgpu.barrier_wait(mine)

        def step(masked: bool, head: jax.Array, index: jax.Array, carry: Any) -> Any:
            dk_sums, dv_sums = carry
            slot = pipeline.slot_of(head * steps + index)
            plgpu.barrier_wait(scratch.ring.loaded.at[slot])
            q, g = scratch.q.at[slot], [scratch.g.at[slot * shared + i] for i in range(shared)]
            # All transposed: keys down, queries across. The numbers of the queries are read when they are needed.
            x = tensor_core.product(k, transposed(q)) * dh**-0.5
            weights, slope = weighing.again(x, tensor_core.along_columns(scratch.numbers.at[slot, 0]))
            if masked:
                seen = tensor_core.causal(first, block * BLOCK + index * STEP, STEP, transposed=True)
                weights, slope = jnp.where(seen, weights, 0), jnp.where(seen, slope, 0)
            weights = weights.astype(k.dtype)
            dv_sums = tuple(tensor_core.add_products(part, (weights, g[i])) for i, part in enumerate(dv_sums))
            means = tensor_core.along_columns(scratch.numbers.at[slot, 1])
            dw = tensor_core.add_products(-means, *((v[i], transposed(g[i])) for i in range(shared)))
            dk_sums = tensor_core.add_products(dk_sums, ((slope * dw).astype(k.dtype), q))
            plgpu.commit_smem()  # the numbers were read, before a copy writes there again
            plgpu.barrier_arrive(scratch.ring.used.at[slot])
            return dk_sums, dv_sums

        def of_head(head: jax.Array, carry: Any) -> Any:
            carry = jax.lax.fori_loop(0, at_diagonal, functools.partial(step, True, head), carry)
            return jax.lax.fori_loop(at_diagonal, steps, functools.partial(step, False, head), carry)

        carry = tensor_core.zeros(dh), tuple(tensor_core.zeros(width) for _ in range(shared))
        dk_sums, dv_sums = jax.lax.fori_loop(0, heads, of_head, carry)
        k[...] = (dk_sums * dh**-0.5).astype(k.dtype)
        for i, part in enumerate(dv_sums):
            v[i][...] = part.astype(k.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk.at[group, here, kv_head])
        sequences.write(scratch.v, warpgroup, dv, here, kv_head)
        plgpu.wait_smem_to_gmem(0)

    pipeline.run(compute, load, scratch.ring, steps, rounds=heads)
