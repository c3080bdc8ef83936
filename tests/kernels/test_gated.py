"""The recurrences with a decay: chunks, pieces, documents against the dense definitions, and those against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.extend.core import jaxprs_in_params

from deconstruct.kernels import gated_delta, gated_linear, recurrences, recurrent_chunks, reference
from deconstruct.kernels.mask import CAUSAL, Mask
from tests.tiny import quick

FORMS = ["gated_linear", "gated_delta"]
# Two levels of blocks in gated_linear (16 and 32), two of the inverse in gated_delta (8, 16 and 32), several chunks.
CHUNK = 32
GQA, SHARED, ONE = oracle.SHAPES[0], oracle.SHAPES[2], oracle.SHAPES[3]


def mix(form, q, k, v, *gates, **options):
    """Output and state; `gates` are log_decay, and beta for gated_delta."""
    options.setdefault("chunk", CHUNK)
    if form == "gated_linear":
        return gated_linear.gated_linear_attention(q, k, v, log_decay=gates[0], **options)
    return gated_delta.gated_delta_attention(q, k, v, log_decay=gates[0], beta=gates[1], **options)


def define(form, q, k, v, *gates, mask=CAUSAL):
    names = ("log_decay", "beta")[: len(gates)]
    weights = {"gated_linear": recurrences.gated_linear_weights, "gated_delta": recurrences.gated_delta_weights}[form]
    return reference.apply_weights(weights(q, k, mask, **dict(zip(names, gates, strict=True))), v)


def inputs(form, shape, seed=0):
    """q, k, v, gates and a cotangent, float64. Decays from hardly any to nearly all, in every channel."""
    q, k, v, g = oracle.inputs(shape, seed)
    rng = np.random.default_rng(seed + 100)
    decay = -np.exp(rng.normal(size=k.shape if form == "gated_linear" else k.shape[:3]) * 2 - 2)
    beta = () if form == "gated_linear" else (1 / (1 + np.exp(-rng.normal(size=k.shape[:3]))),)
    return (q, k, v, decay, *beta), g


@functools.cache
def _program(form, kind):
    def both(arrays, g, begins):
        mask = Mask(begins)
        function = {
            "defined": lambda *x: define(form, *x, mask=mask),
            "chunks": lambda *x: mix(form, *x, mask=mask)[0],
        }[kind]
        out, pull = jax.vjp(function, *arrays)
        return (out, *pull(g))

    return jax.jit(both)


def value_and_gradients(form, kind, arrays, g, dtype="float64", begins=None):
    """out and the gradients of q, k, v and the gates. The gates of bfloat16 inputs are float32, as in a model."""
    gate = "float32" if dtype == "bfloat16" else dtype
    with jax.enable_x64(dtype == "float64"):
        given = tuple(jnp.asarray(x, dtype if i < 3 else gate) for i, x in enumerate(arrays))
        begins = None if begins is None else jnp.asarray(begins, jnp.int32)
        results = _program(form, kind)(given, jnp.asarray(g, dtype), begins)
        assert [x.dtype for x in results] == [given[2].dtype, *(x.dtype for x in given)]
        return tuple(np.asarray(x.astype(gate)) for x in results)


@functools.cache
def _wanted(form, shape):
    return value_and_gradients(form, "defined", *inputs(form, shape))


def recurrence(form, q, k, v, decay, beta=None, *, begins=None):
    """One position after the other, as the papers write it: numpy, one sequence and head at a time.

    A map that serves several rows is repeated; a document begins with an empty state."""
    q, k, decay = (np.broadcast_to(x, (len(v), *x.shape[1:])) for x in (q, k, decay))
    beta = None if beta is None else np.broadcast_to(beta, (len(v), *beta.shape[1:]))
    batch, length, heads, dh = q.shape
    groups = heads // k.shape[2]
    if form == "gated_delta":
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    outs = np.zeros((batch, length, heads, v.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        n, s = h // groups, np.zeros((dh, v.shape[-1]))
        for t in range(length):
            if begins is not None and begins[b, t] == t:
                s = np.zeros_like(s)
            key, value, a = k[b, t, n], v[b, t, n], np.exp(decay[b, t, n])
            if form == "gated_linear":
                s = np.diag(a) @ s + np.outer(key, value)
            else:
                strength = beta[b, t, n]
                s = a * (np.eye(dh) - strength * np.outer(key, key)) @ s + strength * np.outer(key, value)
            outs[b, t, h] = q[b, t, h] @ s / np.sqrt(dh)
    return outs


@pytest.mark.parametrize("form", FORMS)
def test_definition_and_chunks_are_the_recurrence(form):
    arrays, g = inputs(form, GQA)
    want = recurrence(form, *arrays)
    # float64, some 60 terms in another order.
    oracle.assert_near(_wanted(form, GQA)[0], want, 1e-13)
    oracle.assert_near(value_and_gradients(form, "chunks", arrays, g)[0], want, 1e-13)


def test_the_map_of_gated_linear_by_its_formula():
    (q, k, _, decay), _ = inputs("gated_linear", (1, 1, 12, 1, 1, 4, 4))
    sums = np.cumsum(decay[0, :, 0], axis=0)
    want = np.einsum("ic,jc,ijc->ij", q[0, :, 0], k[0, :, 0], np.exp(sums[:, None] - sums[None])) / 2
    with jax.enable_x64(True):
        got = recurrences.gated_linear_weights(jnp.asarray(q), jnp.asarray(k), log_decay=jnp.asarray(decay))
    np.testing.assert_allclose(got[0, 0], np.tril(want), rtol=1e-12, atol=1e-14)  # a few float64 roundings
    assert (np.asarray(got)[0, 0][np.triu_indices(12, 1)] == 0).all()


@pytest.mark.parametrize("shape", [GQA, SHARED, ONE], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, shape):
    """float64 in, float64 throughout: anything computed in float32 would be off by 1e-7."""
    got = value_and_gradients(form, "chunks", *inputs(form, shape))
    oracle.assert_all_near(got, _wanted(form, shape), 1e-12)


@pytest.mark.proof
@pytest.mark.parametrize("form", FORMS)
def test_float32(form):
    got = value_and_gradients(form, "chunks", *inputs(form, GQA), "float32")
    oracle.assert_all_near(got, _wanted(form, GQA), oracle.FLOAT32)


@pytest.mark.proof
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    """The inputs are rounded first, for both. Then keys, weights, corrections, state and output are, each by 2^-9, and
    in the backward pass their cotangents: a handful of roundings stays below 2 % of the largest entry. gated_delta also
    rounds q and k after bringing them to unit length, and its corrections are of corrections: twice that."""
    arrays, g = inputs(form, SHARED)
    q, k, v, g = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (*arrays[:3], g))
    gates = [np.asarray(x, np.float32).astype(np.float64) for x in arrays[3:]]
    want = value_and_gradients(form, "defined", (q, k, v, *gates), g)
    got = value_and_gradients(form, "chunks", (q, k, v, *gates), g, "bfloat16")
    oracle.assert_all_near(got, want, 2e-2 if form == "gated_linear" else 4e-2)


@pytest.mark.parametrize("decay", quick(["none", "-50", "-1e4", "mixed"], ["none", "mixed"]))
@pytest.mark.parametrize("form", FORMS)
def test_any_decay(form, decay):
    """None; -50 and -1e4 a step; and, from step to step and channel to channel, all of these and small ones: after a
    sum of -1e4 a float32 difference of sums would know the small ones to 1e-3 only."""
    arrays, g = inputs(form, GQA, seed=3)
    levels = {"none": [0.0], "-50": [-50.0], "-1e4": [-1e4], "mixed": [0.0, -1e-3, -0.1, -1.0, -0.01, -50.0, -1e4]}
    gate = np.random.default_rng(4).choice(levels[decay], size=arrays[3].shape)
    arrays = (*arrays[:3], gate.astype(np.float32).astype(np.float64), *arrays[4:])
    want = value_and_gradients(form, "defined", arrays, g)
    oracle.assert_all_near(value_and_gradients(form, "chunks", arrays, g, "float32"), want, oracle.FLOAT32)
    oracle.assert_all_near(value_and_gradients(form, "chunks", arrays, g), want, 1e-12)


def test_one_key_again_and_again():
    """The same key at every position with beta 1 and no decay: the memory is the last value. A series in powers of the
    triangle, whose entries are all one, would lose everything to cancellation."""
    arrays, g = inputs("gated_delta", GQA, seed=5)
    q, k, v, decay, beta = arrays
    k = np.broadcast_to(k[:, :1], k.shape)
    arrays = (q, k, v, 0 * decay, 0 * beta + 1)
    want = value_and_gradients("gated_delta", "defined", arrays, g)
    got = value_and_gradients("gated_delta", "chunks", arrays, g, "float32")
    # 63 corrections, none of which decays, each with a rounding of its own (and one by the norm's epsilon).
    oracle.assert_all_near(got, want, 10 * oracle.FLOAT32)


@functools.cache
def _piece(form):
    return jax.jit(lambda arrays, state, begins: mix(form, *arrays, state=state, mask=Mask(begins), chunk=8))


def in_pieces(form, arrays, piece, begins=None, dtype="float32"):
    """The output, and the state after each piece; `begins` [B, L] counts from the sequence's first position."""
    length, outs, states = arrays[0].shape[1], [], [None]
    for first in range(0, length, piece):
        part = tuple(jnp.asarray(x[:, first : first + piece], dtype) for x in arrays)
        relative = None if begins is None else jnp.asarray(begins[:, first : first + piece] - first, jnp.int32)
        out, state = _piece(form)(part, states[-1], relative)
        outs.append(np.asarray(out))
        states.append(state)
    return np.concatenate(outs, axis=1), states[-1]


@pytest.mark.parametrize(
    "shape", [(2, 2, 22, 4, 2, 4, 6), pytest.param((1, 3, 22, 2, 2, 4, 4), marks=pytest.mark.proof)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_one_pass(form, shape):
    arrays, _ = inputs(form, shape, seed=11)
    want = recurrence(form, *arrays)
    states = []
    for piece in (22, 7, 1) if shape[0] > 1 else (7,):
        got, state = in_pieces(form, arrays, piece)
        oracle.assert_near(got, want, oracle.FLOAT32)
        states.append(state)
    make = {"gated_linear": gated_linear.init_gated_linear_state, "gated_delta": gated_delta.init_gated_delta_state}
    empty = make[form](shape[0], shape[1], *(shape[i] for i in (4, 5, 6)))
    for state in states:
        assert (state.s.shape, state.s.dtype) == (empty.s.shape, empty.s.dtype)
        oracle.assert_near(np.asarray(state.s), np.asarray(states[0].s), oracle.FLOAT32)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_reaches_through_the_state(form):
    arrays, g = inputs(form, GQA)

    @jax.jit
    def in_three(arrays, g):
        def pieces(*x):
            first, state = mix(form, *(y[:, :30] for y in x), chunk=8)
            second, state = mix(form, *(y[:, 30:62] for y in x), state=state, chunk=8)
            third, _ = mix(form, *(y[:, 62:] for y in x), state=state, chunk=8)
            return jnp.concatenate([first, second, third], axis=1)

        out, pull = jax.vjp(pieces, *arrays)
        return (out, *pull(g))

    with jax.enable_x64(True):
        got = in_three(tuple(map(jnp.asarray, arrays)), jnp.asarray(g))
        oracle.assert_all_near(tuple(map(np.asarray, got)), _wanted(form, GQA), 1e-12)


# Two rows of 63, cut into documents: borders within chunks of 32, at a chunk's begin, of one position, in the tail.
DOCUMENTS = [[13, 1, 18, 31], [40, 23]]


def begins_of(documents):
    return np.array([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in documents])


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_are_the_documents_alone(form):
    arrays, g = inputs(form, GQA, seed=13)
    begins = begins_of(DOCUMENTS)
    defined = value_and_gradients(form, "defined", arrays, g, begins=begins)
    packed = value_and_gradients(form, "chunks", arrays, g, begins=begins)
    oracle.assert_all_near(packed, defined, 1e-12)
    # Each document alone, at the begin of a row of its own; what follows it there is ignored (it has no cotangent).
    alone = [np.zeros_like(x) for x in packed]
    for row, documents in enumerate(DOCUMENTS):
        for first, size in zip(np.cumsum([0, *documents[:-1]]), documents, strict=True):
            own = [np.stack([x[row]] * 2) for x in (*arrays, g)]
            for x, whole in zip(own, (*arrays, g), strict=True):
                x[:] = 0
                x[0, :size] = whole[row, first : first + size]
            for into, x in zip(alone, value_and_gradients(form, "chunks", tuple(own[:-1]), own[-1]), strict=True):
                into[row, first : first + size] = x[0, :size]
    # The decay of a document's first position acts on nothing.
    oracle.assert_all_near(packed, tuple(alone), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_passes_a_border(form):
    """A key and a value of 1e12 in one document leave every bit of the others as it was, outputs and gradients."""
    arrays, g = inputs(form, GQA, seed=14)
    begins = begins_of(DOCUMENTS)
    before = value_and_gradients(form, "chunks", arrays, g, begins=begins)
    _, k, v, *_ = arrays
    k, v = k.copy(), v.copy()
    k[0, 13], v[0, 13] = 1e12, 1e12  # a document by itself
    k[1, 39], v[1, 39] = 1e12, 1e12  # the last of its document
    after = value_and_gradients(form, "chunks", (arrays[0], k, v, *arrays[3:]), g, begins=begins)
    for a, b in zip(after, before, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(np.delete(a[0], 13, 0), np.delete(b[0], 13, 0))
        np.testing.assert_array_equal(a[1, 40:], b[1, 40:])


@pytest.mark.parametrize("form", FORMS)
def test_documents_in_pieces(form):
    """A border at a piece's begin (position 14 of the first row) drops the state, one before it does not."""
    arrays, _ = inputs(form, (2, 2, 22, 4, 2, 4, 6), seed=15)
    begins = begins_of([[13, 1, 8], [20, 2]])
    want = recurrence(form, *arrays, begins=begins)
    for piece in (22, 7, 1):
        got, _ = in_pieces(form, arrays, piece, begins)
        oracle.assert_near(got, want, oracle.FLOAT32)


@pytest.mark.parametrize("form", FORMS)
def test_errors(form):
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in inputs(form, (1, 2, 6, 2, 1, 4, 4))[0])
    begins = jnp.zeros((2, 6), jnp.int32)
    for call in (mix, define):
        with pytest.raises(ValueError, match=r"no window \(got window=4\)"):
            call(form, *arrays, mask=Mask(window=4))
    with pytest.raises(ValueError, match=r"documents need a map for each row: begins of shape \(2, 6\), queries of ba"):
        mix(form, *arrays, mask=Mask(begins))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 kv heads"):
        mix(form, jnp.zeros((1, 6, 3, 4)), jnp.zeros((1, 6, 2, 4)), jnp.zeros((1, 6, 2, 4)), *arrays[3:])


def dot_flops(jaxpr):
    """2 m n k of every matmul, a scan's times its length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            size = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2 * size * np.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * dot_flops(inner)
    return total


@pytest.mark.parametrize(("length", "chunk"), [(256, 64), (130, 32), (20, 64), (5, 64)])
@pytest.mark.parametrize("form", FORMS)
def test_flops_are_those_of_the_program(form, length, chunk):
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in inputs(form, (1, 3, length, 4, 2, 16, 8))[0])
    found = dot_flops(jax.make_jaxpr(lambda *x: mix(form, *x, chunk=chunk))(*arrays).jaxpr)
    count = {"gated_linear": gated_linear.gated_linear_flops, "gated_delta": gated_delta.gated_delta_flops}[form]
    assert found == count(length, 4, 2, 16, 8, rows=3, chunk=chunk)


@pytest.mark.parametrize("form", FORMS)
def test_a_decoded_token_is_updated_in_place(form):
    """No chunk, no loop, and no copy of a state that may be overwritten."""
    arrays, _ = inputs(form, (2, 2, 1, 4, 2, 16, 8))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    make = {"gated_linear": gated_linear.init_gated_linear_state, "gated_delta": gated_delta.init_gated_delta_state}
    state = make[form](2, 2, 2, 16, 8)
    step = jax.jit(lambda state, arrays: mix(form, *arrays, state=state), donate_argnums=0)
    lowered = step.lower(state, arrays)
    assert "while" not in lowered.as_text()
    assert not [line for line in lowered.compile().as_text().splitlines() if " copy(" in line and "f32[4,16,8]" in line]
    # What is element-wise: the outer product that is added.
    decoded = {
        "gated_linear": gated_linear.gated_linear_decode_flops,
        "gated_delta": gated_delta.gated_delta_decode_flops,
    }
    found = dot_flops(jax.make_jaxpr(lambda *x: mix(form, *x))(*arrays).jaxpr) / 2
    assert found + 2 * 2 * 16 * 8 == decoded[form](4, 2, 16, 8)


def test_chunks_are_powers_of_two():
    assert [recurrent_chunks.chunk_size(*x) for x in ((64, 1), (64, 5), (5, 100), (64, 64), (64, 999))] == [
        1,
        8,
        8,
        64,
        64,
    ]
