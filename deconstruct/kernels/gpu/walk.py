"""The state of a recurrence over chunks on a Hopper GPU, and its gradients: all that must go one chunk after the other.

    X_n = U_n + A_n S_n,    S_{n+1} = diag(d_n) S_n + B_n^T X_n,    S_0 = 0

S_n [dh, w], before each chunk, and X_n [C, w] are the results; what chunks read of them is for XLA, of all at once. The
gradients are the same walk from the last chunk to the first, with A and B in each other's place: of cotangents F of S
and G of X,

    Y_n = G_n + B_n D_n,    D_{n-1} = diag(d_n) D_n + A_n^T Y_n + F_n

where D_n is the cotangent of S_{n+1} and Y_n that of U_n; those of A, B and d are products of these with S and X. The
state is summed in float32 registers; operands of products, and results, are rounded to the inputs' dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deconstruct.kernels import grouped
from deconstruct.kernels.gpu import tensor_core, varying
from deconstruct.kernels.gpu.tensor_core import ROWS, along_rows, load_tile, row_numbers, transposed

CHUNK = ROWS  # positions
WIDTH = 64  # columns of the state that a warpgroup carries: no column needs another
AHEAD = 2  # chunks on their way from memory at a time


def walk(
    chunks: int, decay: jax.Array, reads: jax.Array | None, writes: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """S before each chunk, [T b, K, dh, w], and X [T b, K, C, w]: b K walks of T = `chunks` chunks.

    decay d float32 [T b, K, dh], reads A and writes B [T b, K, C, dh], values U [T b, K, C, w]; without `reads` X is U.
    C is 64, dh and w are multiples of 64. Under a mesh it is to be called within `jax.shard_map`: XLA does not divide a
    kernel.
    """
    arrays, tree = jax.tree.flatten((decay, reads, writes, values))
    arrays = [x.reshape(chunks, -1, *x.shape[2:]) for x in varying.together(*arrays)]
    states, corrected = _walk(*jax.tree.unflatten(tree, arrays))
    return states.reshape(*writes.shape[:2], *states.shape[2:]), corrected.reshape(values.shape)


@jax.custom_vjp
def _walk(
    decay: jax.Array, reads: jax.Array | None, writes: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same of [T, N, ...], N = b K."""
    states, *corrected = varying.like(values, *_states(_Chunks(decay, reads, writes, values)))
    return states, (corrected[0] if corrected else values)


def _forward(*given: Any) -> tuple[Any, tuple[Any, ...]]:
    results = _walk(*given)
    return results, (*given, *results)


def _backward(saved: tuple[Any, ...], g: tuple[Any, Any]) -> tuple[Any, ...]:
    decay, reads, writes, values, states, corrected = saved
    dstates, dcorrected = (x.astype(values.dtype) for x in g)
    if reads is None:
        (later,) = varying.like(values, *_states(_Chunks(decay, added=dstates), backwards=True))
        dreads, dvalues = None, dcorrected + _product("tncd,tndw->tncw", writes, later)
    else:
        chunks = _Chunks(decay, writes, reads, dcorrected, dstates)
        later, dvalues = varying.like(values, *_states(chunks, backwards=True))
        dreads = _product("tncw,tndw->tncd", dvalues, states)
    ddecay = (states.astype(jnp.float32) * later.astype(jnp.float32)).sum(-1)
    return ddecay, dreads, _product("tncw,tndw->tncd", corrected, later), dvalues


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return grouped.contract(equation, a, b).astype(a.dtype)


_walk.defvjp(_forward, _backward)


class _Chunks(NamedTuple):
    """What the kernel reads, [T, N, ...]. Without `writes` no X is added to the state; without `reads` X is U."""

    decay: Any  # d
    reads: Any = None  # A
    writes: Any = None  # B
    values: Any = None  # U
    added: Any = None  # F


class _Scratch(NamedTuple):
    decay: Any
    reads: Any
    writes: Any
    values: Any
    added: Any
    states: Any
    corrected: Any
    loaded: Any


def _states(chunks: _Chunks, backwards: bool = False) -> list[jax.Array]:
    """S before each chunk in the order of the walk, and X where there are `reads`."""
    (count, rows, dh), (arrays, tree) = chunks.decay.shape, jax.tree.flatten(chunks)
    width, dtype = arrays[-1].shape[-1], arrays[-1].dtype

    def tiles(of: Any, buffers: int, down: int, across: int) -> Any:
        return None if of is None else tensor_core.tiles(buffers, down, across, dtype=dtype)

    scratch = _Scratch(
        decay=plgpu.SMEM((AHEAD, dh), jnp.float32),
        reads=tiles(chunks.reads, AHEAD, CHUNK, dh),
        writes=tiles(chunks.writes, AHEAD, CHUNK, dh),
        values=tiles(chunks.values, AHEAD, CHUNK, WIDTH),
        added=tiles(chunks.added, AHEAD, dh, WIDTH),
        states=tensor_core.tiles(2, dh, WIDTH, dtype=dtype),
        corrected=tiles(chunks.reads, 2, CHUNK, WIDTH),
        loaded=plgpu.Barrier(num_arrivals=len(arrays), num_barriers=AHEAD),
    )
    results = [jax.ShapeDtypeStruct((count, rows, dh, width), dtype)]
    if chunks.reads is not None:
        results.append(jax.ShapeDtypeStruct((count, rows, CHUNK, width), dtype))

    def chunk_states(*refs: Any) -> None:
        _kernel(jax.tree.unflatten(tree, refs[: len(arrays)]), refs[len(arrays) : -1], refs[-1], backwards)

    return plgpu.kernel(
        chunk_states,
        out_type=tuple(results),
        scratch_types=(scratch,),
        grid=(rows, width // WIDTH),
        grid_names=("row", "column"),
        compiler_params=tensor_core.COMPILER,
    )(*arrays)


def _kernel(of: _Chunks, outputs: tuple[Any, ...], scratch: _Scratch, backwards: bool) -> None:
    row, columns = jax.lax.axis_index("row"), pl.ds(jax.lax.axis_index("column") * WIDTH, WIDTH)
    count, dh = of.decay.shape[0], of.decay.shape[-1]
    parts = [pl.ds(first, ROWS) for first in range(0, dh, ROWS)]  # of the state, as products make them

    def place_of(step: Any) -> Any:
        return count - 1 - step if backwards else step

    def load(step: Any, slot: Any) -> None:
        here, loaded = place_of(step), scratch.loaded.at[slot]
        for name, source in of._asdict().items():
            if source is not None:
                across = name in ("values", "added")
                tile = source.at[here, row, :, columns] if across else source.at[here, row]
                plgpu.copy_gmem_to_smem(tile, getattr(scratch, name).at[slot], loaded)

    def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        here = place_of(index)
        slot, place = jax.lax.rem(index, jnp.int32(AHEAD)), jax.lax.rem(index, jnp.int32(2))
        plgpu.barrier_wait(scratch.loaded.at[slot])
        # What was written from there two steps ago has been read.
        plgpu.wait_smem_to_gmem(len(outputs), wait_read_only=True)
        before = scratch.states.at[place]
        for part, s in zip(parts, state, strict=True):
            before[part] = s.astype(before.dtype)
        decays = (row_numbers(scratch.decay.at[slot, part]) for part in parts)
        state = tuple(along_rows(d, WIDTH) * s for d, s in zip(decays, state, strict=True))
        if of.added is not None:
            added = [load_tile(scratch.added.at[slot, part]).astype(jnp.float32) for part in parts]
            state = tuple(s + x for s, x in zip(state, added, strict=True))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(before, outputs[0].at[here, row, :, columns])
        values = None if of.values is None else scratch.values.at[slot]
        if of.reads is not None:
            sums = load_tile(values).astype(jnp.float32)
            sums = tensor_core.add_products(sums, (scratch.reads.at[slot], before))
            values = scratch.corrected.at[place]
            values[...] = sums.astype(values.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values, outputs[1].at[here, row, :, columns])
        if of.writes is not None:
            state = tuple(
                tensor_core.add_products(s, (transposed(scratch.writes.at[slot, :, part]), values))
                for part, s in zip(parts, state, strict=True)
            )

        @pl.when(index + AHEAD < count)
        def _ahead() -> None:
            load(index + AHEAD, slot)

        return state

    for index in range(min(AHEAD, count)):
        load(index, index)
    jax.lax.fori_loop(0, count, step, tuple(tensor_core.zeros(WIDTH) for _ in parts))
    plgpu.wait_smem_to_gmem(0)
