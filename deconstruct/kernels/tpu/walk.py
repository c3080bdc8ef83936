"""A recurrence over chunks as one kernel: the state stays on the chip from the first chunk to the last.

`walk(step, state, chunks)` is `jax.lax.scan(step, state, chunks)` for each of N independent rows (sequences and heads),
for any `step` that is pure and made of what Mosaic knows. Rows are a parallel axis of the grid, chunks a sequential
one. The backward pass walks from the last chunk to the first with the derivative of `step` itself, taken inside the
kernel (`jax.vjp`), from the state before each chunk, which the forward pass of a training step writes down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Step = Callable[[Any, Any], tuple[Any, Any]]

VMEM_LIMIT = 60 * 2**20  # bytes; a state of Taylor's at dh = 128, its cotangent and what derives from them


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk(step: Step, state: Any, chunks: Any) -> tuple[Any, Any]:
    """The state after all chunks, and what each gave.

    state: a tree of float arrays [N, a, b]; chunks: a tree of arrays [N, T, c, d], of which integers are not
    differentiated. step(state, chunk) -> (state, out) on the [a, b] and [c, d] of one row: out a tree of [e, f]. As an
    argument of a compiled function `step` must be the same object each time: no lambda.
    """
    state, out, _ = _forward_call(step, state, chunks, keep=False)
    return state, out


def _forward(step: Step, state: Any, chunks: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    after, out, before = _forward_call(step, state, chunks, keep=True)
    return (after, out), (before, chunks)


def _forward_call(step: Step, state: Any, chunks: Any, keep: bool) -> tuple[Any, Any, Any]:
    states, state_tree = jax.tree.flatten(state)
    pieces, chunk_tree = jax.tree.flatten(chunks)
    rows, steps = pieces[0].shape[:2]
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in states]
    piece = [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in pieces]
    _, out = jax.eval_shape(step, jax.tree.unflatten(state_tree, one), jax.tree.unflatten(chunk_tree, piece))
    outs, out_tree = jax.tree.flatten(out)

    def kernel(*refs: Any) -> None:
        state_in, chunk, given, state_out, before, held = _groups(
            refs, len(states), len(pieces), len(outs), len(states), len(states) * keep, len(states)
        )
        at = pl.program_id(1)

        @pl.when(at == 0)
        def _() -> None:
            for here, first in zip(held, state_in, strict=True):
                here[...] = first[0]

        now = [x[...] for x in held]
        for kept, x in zip(before, now, strict=False):
            kept[0, 0] = x
        after, result = step(
            jax.tree.unflatten(state_tree, now), jax.tree.unflatten(chunk_tree, [x[0, 0] for x in chunk])
        )
        for ref, x in zip(given, jax.tree.leaves(result), strict=True):
            ref[0, 0] = x
        for ref, x in zip(held, jax.tree.leaves(after), strict=True):
            ref[...] = x

        @pl.when(at == steps - 1)
        def _() -> None:
            for last, ref in zip(state_out, held, strict=True):
                last[0] = ref[...]

    along = functools.partial(_along, lambda t: t)
    results = pl.pallas_call(
        kernel,
        grid=(rows, steps),
        in_specs=[*(_whole(x) for x in one), *(along(x) for x in piece)],
        out_specs=[*(along(x) for x in outs), *(_whole(x) for x in one), *(along(x) for x in one * keep)],
        out_shape=[
            *(jax.ShapeDtypeStruct((rows, steps, *x.shape), x.dtype) for x in outs),
            *(jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for x in one),
            *(jax.ShapeDtypeStruct((rows, steps, *x.shape), x.dtype) for x in one * keep),
        ],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in one],
        compiler_params=_compiler_params(),
        name="walk_forward",
    )(*states, *pieces)
    given, after, before = _groups(results, len(outs), len(states), len(states) * keep)
    return (
        jax.tree.unflatten(state_tree, after),
        jax.tree.unflatten(out_tree, given),
        jax.tree.unflatten(state_tree, before) if keep else None,
    )


def _backward(step: Step, saved: tuple[Any, Any], cotangents: tuple[Any, Any]) -> tuple[Any, Any]:
    before, chunks = saved
    befores, state_tree = jax.tree.flatten(before)
    pieces, chunk_tree = jax.tree.flatten(chunks)
    ends, gives = jax.tree.leaves(cotangents[0]), jax.tree.leaves(cotangents[1])
    rows, steps = pieces[0].shape[:2]
    floats = [i for i, x in enumerate(pieces) if jnp.issubdtype(x.dtype, jnp.floating)]

    def kernel(*refs: Any) -> None:
        held, chunk, end, given, d_chunk, d_state, carried = _groups(
            refs, len(befores), len(pieces), len(ends), len(gives), len(floats), len(ends), len(ends)
        )
        at = pl.program_id(1)

        @pl.when(at == 0)
        def _() -> None:
            for here, last in zip(carried, end, strict=True):
                here[...] = last[0]

        inputs = [x[0, 0] for x in chunk]

        def differentiated(state: list[Any], chosen: list[Any]) -> Any:
            whole = list(inputs)
            for i, x in zip(floats, chosen, strict=True):
                whole[i] = x
            after, out = step(jax.tree.unflatten(state_tree, state), jax.tree.unflatten(chunk_tree, whole))
            return jax.tree.leaves(after), jax.tree.leaves(out)

        _, pull = jax.vjp(differentiated, [x[0, 0] for x in held], [inputs[i] for i in floats])
        back, chosen = pull(([x[...] for x in carried], [x[0, 0] for x in given]))
        for ref, x in zip(d_chunk, chosen, strict=True):
            ref[0, 0] = x
        for ref, x in zip(carried, back, strict=True):
            ref[...] = x

        @pl.when(at == steps - 1)
        def _() -> None:
            for first, ref in zip(d_state, carried, strict=True):
                first[0] = ref[...]

    def shape(x: jax.Array, axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)

    along = functools.partial(_along, lambda t: steps - 1 - t)
    one = [shape(x, 1) for x in ends]
    results = pl.pallas_call(
        kernel,
        grid=(rows, steps),
        in_specs=[
            *(along(shape(x, 2)) for x in (*befores, *pieces)),
            *(_whole(x) for x in one),
            *(along(shape(x, 2)) for x in gives),
        ],
        out_specs=[*(along(shape(pieces[i], 2)) for i in floats), *(_whole(x) for x in one)],
        out_shape=[
            *(jax.ShapeDtypeStruct(pieces[i].shape, pieces[i].dtype) for i in floats),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ends),
        ],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in one],
        compiler_params=_compiler_params(),
        name="walk_backward",
    )(*befores, *pieces, *ends, *gives)
    chosen, d_state = _groups(results, len(floats), len(ends))
    d_chunks: list[Any] = [None] * len(pieces)
    for i, x in zip(floats, chosen, strict=True):
        d_chunks[i] = x
    return jax.tree.unflatten(state_tree, d_state), jax.tree.unflatten(chunk_tree, d_chunks)


walk.defvjp(_forward, _backward)


def _groups(refs: Any, *counts: int) -> list[Any]:
    """Cuts a flat sequence into pieces of these lengths."""
    groups, first = [], 0
    for count in counts:
        groups.append(list(refs[first : first + count]))
        first += count
    return groups


def _along(order: Callable[[Any], Any], x: Any) -> pl.BlockSpec:
    """Of [N, T, c, d], one chunk of one row at a time."""
    return pl.BlockSpec((1, 1, *x.shape), lambda n, t: (n, order(t), 0, 0))


def _whole(x: Any) -> pl.BlockSpec:
    return pl.BlockSpec((1, *x.shape), lambda n, t: (n, 0, 0))


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)
