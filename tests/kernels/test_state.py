"""Sequences taken in pieces: split, resume, and the cache, equal to one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import kv_cache, self_gate, softmax, taylor, taylor_diagonal
from deconstruct.kernels.mask import Mask

# The same is asked of the forms in tests/attention; here of the kernels, at more shapes.
pytestmark = pytest.mark.proof

STATEFUL = {
    "taylor": taylor.taylor_chunked,
    "taylor_diagonal": taylor_diagonal.taylor_diagonal_attention,
    "self_gate": self_gate.self_gate_attention,
}
LENGTH = 22


@pytest.mark.parametrize("shape", [(2, 2, LENGTH, 4, 2, 4, 6), (1, 3, LENGTH, 2, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("form", STATEFUL)
def test_pieces_equal_one_pass(form, shape):
    arrays = oracle.inputs(shape, seed=11)
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    mix = jax.jit(STATEFUL[form], static_argnames="chunk")
    states = []
    for piece in (LENGTH, 7, 1) if shape[0] > 1 else (LENGTH, 7):
        state, outs = None, []
        for first in range(0, LENGTH, piece):
            part = (x[:, first : first + piece] for x in (q, k, v))
            out, state = mix(*part, state, chunk=5)
            outs.append(np.asarray(out))
        # Near-zero first-order sums of taylor_diagonal magnify float32 roundings, as in test_fast_paths.
        tolerance = 40 * oracle.FLOAT32 if form == "taylor_diagonal" else oracle.FLOAT32
        oracle.assert_near(np.concatenate(outs, axis=1), want, tolerance)
        states.append(state)
    for other in states[1:]:
        for name, a, b in zip(state._fields, other, states[0], strict=True):
            assert a.dtype == b.dtype == jnp.float32, name
            oracle.assert_near(np.asarray(a), np.asarray(b), oracle.FLOAT32)


@pytest.mark.parametrize("form", STATEFUL)
def test_gradient_reaches_through_the_state(form):
    arrays = oracle.inputs((1, 2, LENGTH, 2, 1, 4, 4), seed=12)

    def in_two(q, k, v):
        first, state = STATEFUL[form](q[:, :9], k[:, :9], v[:, :9], chunk=4)
        second, _ = STATEFUL[form](q[:, 9:], k[:, 9:], v[:, 9:], state, chunk=4)
        return jnp.concatenate([first, second], axis=1)

    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")
    # float64, so that the conditioning of taylor_diagonal does not matter: what is missing from a gradient is large.
    oracle.assert_all_near(oracle.value_and_gradients(in_two, arrays, "float64"), want, 1e-10)


@pytest.mark.parametrize("shape", [(2, 2, LENGTH, 4, 2, 4, 6), (1, 3, LENGTH, 2, 2, 4, 4)], ids=str)
def test_softmax_cache_equals_one_pass(shape):
    arrays = oracle.inputs(shape, seed=13)
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS["softmax"]), arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)

    @functools.partial(jax.jit, static_argnames="chunk")
    def extend(q, k, v, cache, chunk=None):
        cache = kv_cache.append(cache, k, v)
        return softmax.softmax_last(q, cache, v.shape[0], chunk), cache

    empty = kv_cache.init_kv_cache(shape[0], shape[1], 2 * LENGTH, *k.shape[2:], v.shape[-1], jnp.float32)
    # What is not yet written is large, so that reading it would be seen.
    empty = empty._replace(k=jnp.full_like(empty.k, 1e4), v=jnp.full_like(empty.v, 1e4))
    for first, piece in ((LENGTH, LENGTH), (8, 7), (0, 7), (0, 1)):
        outs, cache = [], empty
        if first:
            out, cache = extend(q[:, :first], k[:, :first], v[:, :first], cache, chunk=5)
            outs.append(np.asarray(out))
        for begin in range(first, LENGTH, piece):
            part = (x[:, begin : min(begin + piece, LENGTH)] for x in (q, k, v))
            out, cache = extend(*part, cache)
            outs.append(np.asarray(out))
        oracle.assert_near(np.concatenate(outs, axis=1), want, oracle.FLOAT32)
        assert empty.is_new and not cache.is_new and int(cache.length) == LENGTH
        for kept, given in zip(kv_cache.contents(cache, *shape[:2]), (k, v), strict=True):
            np.testing.assert_array_equal(kept[:, :LENGTH], given)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_one_position_of_bfloat16_gives_its_value_back(scale):
    """Nothing else is there to mix with, however large the logit; 2^-9 is a rounding of the result."""
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in oracle.inputs((64, 64, 1, 2, 2, 16, 16), seed=14))
    state = taylor.init_taylor_state(64, 64, 2, 16, 16)
    out, _ = jax.jit(taylor.taylor_chunked)(scale * q, scale * k, v, state)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(v, np.float32), rtol=2**-8)


# Borders on and off those of the pieces, a document of one position, and one that goes on over several pieces.
STARTS = ((0, 7, 8, 18), (0, 3))


def _pieces(piece):
    return [(first, min(first + piece, LENGTH)) for first in range(0, LENGTH, piece)]


@pytest.mark.parametrize("form", ["taylor", "self_gate"])
def test_pieces_of_packed_documents_equal_one_pass(form):
    shape = (2, 2, LENGTH, 4, 2, 4, 6)
    begins = oracle.begins(STARTS, LENGTH)
    arrays = oracle.inputs(shape, seed=15)
    masked = oracle.definition(lambda q, k: oracle.WEIGHTS[form](q, k, Mask(jnp.asarray(begins))))
    want = oracle.value_and_gradients(masked, arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    mix = jax.jit(STATEFUL[form], static_argnames="chunk")
    # The first document of row 0 ends at 7: what its state holds must be gone, whatever its size.
    q, k, v = (x.at[0, :7].multiply(factor) for x, factor in ((q, 1), (k, 1e3), (v, 1e3)))
    states = []
    for piece in (LENGTH, 7, 1):
        state, outs = None, []
        for first, last in _pieces(piece):
            part = (x[:, first:last] for x in (q, k, v))
            out, state = mix(*part, state, chunk=5, mask=Mask(jnp.asarray(begins[:, first:last] - first)))
            outs.append(np.asarray(out))
        out = np.concatenate(outs, axis=1)
        oracle.assert_near(out[0, 7:], want[0, 7:], oracle.FLOAT32)
        oracle.assert_near(out[1], want[1], oracle.FLOAT32)
        states.append(state)
    for other in states[1:]:
        for a, b in zip(other, states[0], strict=True):
            oracle.assert_near(np.asarray(a), np.asarray(b), oracle.FLOAT32)
    if form == "taylor":  # positions in the last document of each row, for both kv heads
        np.testing.assert_array_equal(states[0].n0, [4, 4, 19, 19])


@pytest.mark.parametrize("form", ["taylor", "self_gate"])
def test_gradient_of_packed_documents_reaches_through_the_state(form):
    """In two calls, the second of which begins inside a document of one row and with a new one of the other."""
    begins = oracle.begins(((0, 4), (0, 9, 13)), LENGTH)
    arrays = oracle.inputs((2, 2, LENGTH, 2, 1, 4, 4), seed=16)
    mask = Mask(jnp.asarray(begins))

    def in_two(q, k, v):
        masks = Mask(mask.begins[:, :9]), Mask(mask.begins[:, 9:] - 9)
        first, state = STATEFUL[form](q[:, :9], k[:, :9], v[:, :9], chunk=4, mask=masks[0])
        second, _ = STATEFUL[form](q[:, 9:], k[:, 9:], v[:, 9:], state, chunk=4, mask=masks[1])
        return jnp.concatenate([first, second], axis=1)

    masked = oracle.definition(lambda q, k: oracle.WEIGHTS[form](q, k, mask))
    want = oracle.value_and_gradients(masked, arrays, "float64")
    oracle.assert_all_near(oracle.value_and_gradients(in_two, arrays, "float64"), want, 1e-10)  # as above


@pytest.mark.parametrize("window", [None, 6])
def test_softmax_cache_of_packed_documents_equals_one_pass(window):
    begins = oracle.begins(STARTS, LENGTH)
    arrays = oracle.inputs((2, 2, LENGTH, 4, 2, 4, 6), seed=17)
    mask = Mask(jnp.asarray(begins), window)
    masked = oracle.definition(lambda q, k: oracle.WEIGHTS["softmax"](q, k, mask))
    want = oracle.value_and_gradients(masked, arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)

    @jax.jit
    def extend(q, k, v, cache, begins):
        cache = kv_cache.append(cache, k, v)
        return softmax.softmax_last(q, cache, v.shape[0], 5, Mask(begins, window)), cache

    for piece in (LENGTH, 7, 1):
        cache, outs = kv_cache.init_kv_cache(2, 2, LENGTH + 3, 2, 4, 6, jnp.float32), []
        for first, last in _pieces(piece):
            out, cache = extend(*(x[:, first:last] for x in (q, k, v)), cache, begins[:, first:last] - first)
            outs.append(np.asarray(out))
        oracle.assert_near(np.concatenate(outs, axis=1), want, oracle.FLOAT32)
