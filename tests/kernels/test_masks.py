"""Documents and windows in every kernel that serves them; what is wanted knows nothing of masks wherever it can."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import query_chunks, reference, self_gate, softmax, taylor
from deconstruct.kernels.mask import CAUSAL, Mask

# With chunks of 32: borders within a chunk and on a chunk's, and documents of one position.
SHAPE = (2, 2, 63, 4, 2, 8, 6)
STARTS = ((0, 20, 21, 32), (0, 1, 45))
FORMS = ("softmax", "taylor", "self_gate")
DOCUMENTS = Mask(jnp.asarray(oracle.begins(STARTS, SHAPE[2])))

PATHS = {
    "softmax": ("softmax", functools.partial(softmax.softmax_attention, chunk=32)),
    "taylor_quadratic": ("taylor", functools.partial(taylor.taylor_quadratic, chunk=32)),
    "taylor_chunked": ("taylor", lambda *x, mask: taylor.taylor_chunked(*x, chunk=32, mask=mask)[0]),
    "self_gate": ("self_gate", lambda *x, mask: self_gate.self_gate_attention(*x, chunk=32, mask=mask)[0]),
}


def masked(form, mask):
    return oracle.definition(lambda q, k: oracle.WEIGHTS[form](q, k, mask))


@functools.cache
def _wanted(form, window, documents=True, shape=SHAPE):
    mask = Mask(DOCUMENTS.begins if documents else None, window)
    return oracle.value_and_gradients(masked(form, mask), oracle.inputs(shape), "float64")


@pytest.mark.proof
@pytest.mark.parametrize("form", FORMS)
def test_the_definition_gives_each_document_what_it_has_alone(form):
    """In values and gradients; what is alone is mixed by the definition without a mask."""
    arrays, length = oracle.inputs(SHAPE), SHAPE[2]
    packed = _wanted(form, None)
    alone = [np.zeros_like(x) for x in packed]
    for row, starts in enumerate(STARTS):
        for first, last in zip(starts, [*starts[1:], length], strict=True):
            part = tuple(x[row : row + 1, first:last] for x in arrays)
            results = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), part, "float64")
            for into, result in zip(alone, results, strict=True):
                into[row : row + 1, first:last] = result
    oracle.assert_all_near(packed, tuple(alone), 1e-12)  # float64, summed in another order


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_a_window_is_the_whole_row_restricted_to_it(form):
    q, k, _, _ = oracle.inputs((1, 1, 13, 2, 1, 4, 4), seed=1)
    with jax.enable_x64(True):
        q, k = jnp.asarray(q), jnp.asarray(k)
        got = np.asarray(oracle.WEIGHTS[form](q, k, Mask(window=4)))
        whole = np.asarray(oracle.WEIGHTS[form](q, k, CAUSAL))
    # True of these forms: a weight is a function of its pair, up to the normalisation.
    want = np.where(np.tri(13) - np.tri(13, k=-4), whole, 0)
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), rtol=1e-12)  # float64
    assert ((got > 0).sum(-1) == [min(i + 1, 4) for i in range(13)]).all()


@pytest.mark.parametrize(
    ("path", "window"),
    [
        ("softmax", None),
        ("softmax", 9),
        ("softmax", 40),
        ("taylor_quadratic", None),
        ("taylor_quadratic", 9),
        ("taylor_chunked", None),
        ("self_gate", None),
    ],
)
def test_values_and_gradients_of_packed_documents(path, window):
    form, mix = PATHS[path]
    mask = Mask(DOCUMENTS.begins, window)
    got = oracle.value_and_gradients(functools.partial(mix, mask=mask), oracle.inputs(SHAPE), "float32")
    oracle.assert_all_near(got, _wanted(form, window), oracle.FLOAT32)


@pytest.mark.parametrize("path", PATHS)
def test_float64_stays_float64_under_a_mask(path):
    form, mix = PATHS[path]
    got = oracle.value_and_gradients(functools.partial(mix, mask=DOCUMENTS), oracle.inputs(SHAPE), "float64")
    oracle.assert_all_near(got, _wanted(form, None), 1e-10)  # as in test_fast_paths


@pytest.mark.proof
@pytest.mark.parametrize("path", ["softmax", "taylor_chunked", "self_gate"])
def test_bfloat16_under_a_mask(path):
    form, mix = PATHS[path]
    arrays = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in oracle.inputs(SHAPE))
    want = oracle.value_and_gradients(masked(form, DOCUMENTS), arrays, "float64")
    got = oracle.value_and_gradients(functools.partial(mix, mask=DOCUMENTS), arrays, "bfloat16")
    oracle.assert_all_near(got, want, 2e-2)  # as in test_fast_paths


@pytest.mark.parametrize(("path", "window"), [("softmax", 9), ("softmax", 100), ("taylor_quadratic", 33)])
def test_values_and_gradients_of_a_window_where_rows_share_a_map(path, window):
    form, mix = PATHS[path]
    shape = (1, 3, 70, 2, 2, 8, 4)
    got = oracle.value_and_gradients(functools.partial(mix, mask=Mask(window=window)), oracle.inputs(shape), "float32")
    oracle.assert_all_near(got, _wanted(form, window, False, shape), oracle.FLOAT32)


def test_a_map_that_is_formed_again_has_the_same_mask(monkeypatch):
    mix = functools.partial(PATHS["softmax"][1], mask=Mask(DOCUMENTS.begins, 9))
    monkeypatch.setattr(query_chunks, "KEEP_LENGTH", 1)
    jaxpr = str(jax.make_jaxpr(mix)(*oracle.inputs(SHAPE)[:3]))
    assert "remat" in jaxpr or "checkpoint" in jaxpr
    got = oracle.value_and_gradients(mix, oracle.inputs(SHAPE), "float32")
    oracle.assert_all_near(got, _wanted("softmax", 9), oracle.FLOAT32)


@pytest.mark.parametrize("path", PATHS)
def test_another_document_has_no_part_whatever_is_in_it(path):
    """Bit for bit, in values and gradients, with queries 100 times and keys and values 1e4 times as large in all but
    the last document: logits and scores of a million, of either sign, and second-order sums of 1e13."""
    mix = functools.partial(PATHS[path][1], mask=DOCUMENTS)
    calm = oracle.inputs(SHAPE, seed=3)
    wild = tuple(x.copy() for x in calm)
    for row, starts in enumerate(STARTS):
        for x, factor in zip(wild, (1e2, 1e4, 1e4), strict=False):
            x[row, : starts[-1]] *= factor
    both = [oracle.value_and_gradients(mix, arrays, "float32") for arrays in (calm, wild)]
    for a, b in zip(*both, strict=True):
        for row, starts in enumerate(STARTS):
            assert np.isfinite(b[row]).all()
            np.testing.assert_array_equal(a[row, starts[-1] :], b[row, starts[-1] :])


def test_self_gate_begins_its_maximum_anew():
    """A document 3000 lower than the one before it, and one 3000 higher: nothing underflows."""
    rng = np.random.default_rng(4)
    length = 70
    scores = np.repeat((1500, -1500, 1500), (20, 20, 30))[None, :, None] + rng.normal(size=(1, length, 2))
    k = (scores / 50).astype(np.float32).astype(np.float64)[..., None]  # where q is large silu(q) is q (dh = 1)
    q = np.full_like(k, 50)
    v, g = rng.normal(size=(2, 1, length, 2, 4))
    mask = Mask(jnp.asarray(oracle.begins(((0, 20, 40),), length)))
    want = oracle.value_and_gradients(masked("self_gate", mask), (q, k, v, g), "float64")
    got = oracle.value_and_gradients(functools.partial(PATHS["self_gate"][1], mask=mask), (q, k, v, g), "float32")
    oracle.assert_all_near(got, want, 1e-3)  # a score of 1500 is off by 6e-5, as in test_fast_paths


def test_a_window_of_one_gives_the_values_back():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.inputs((1, 1, 20, 2, 2, 4, 4)))
    np.testing.assert_array_equal(softmax.softmax_attention(q, k, v, mask=Mask(window=1)), v)  # v times 1


@pytest.mark.parametrize("path", ["softmax", "taylor_quadratic"])
def test_a_window_is_all_that_is_read(path):
    """Forward and backward, no array over pairs (two heads of chunk 32) is wider than chunk and window together."""
    arrays = [jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)] * 3

    def loss(q, k, v):
        return PATHS[path][1](q, k, v, mask=Mask(window=24)).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).as_text()
    widths = re.findall(r"tensor<1x2x32x(\d+)xf32>", text)
    assert max(int(width) for width in widths) == 32 + 24 - 1


def test_the_chunk_under_a_window_bounds_what_is_read_in_vain():
    assert query_chunks.default_chunk(8192) == 1024
    assert [query_chunks.default_chunk(8192, window) for window in (16, 512, 4096)] == [128, 512, 1024]
    assert query_chunks.default_chunk(32768, 16) == 512  # 64 chunks to compile, not 256


def test_taylor_attention_takes_a_mask_on_both_paths():
    arrays = oracle.inputs((1, 1, 70, 1, 1, 2, 2))
    mask = Mask(jnp.asarray(oracle.begins(((0, 30),), 70)))
    assert not taylor.chunked_is_cheaper(70, 2) and taylor.chunked_is_cheaper(2048, 2)
    short = oracle.value_and_gradients(functools.partial(taylor.taylor_attention, mask=mask), arrays, "float32")
    oracle.assert_all_near(short, oracle.value_and_gradients(masked("taylor", mask), arrays, "float64"), oracle.FLOAT32)
    long = jax.ShapeDtypeStruct((1, 2048, 1, 2), jnp.float32)
    borders = jnp.zeros((1, 2048), jnp.int32)
    for mask, scans in ((Mask(borders), True), (Mask(borders, 100), False)):
        jaxpr = jax.make_jaxpr(functools.partial(taylor.taylor_attention, mask=mask))(long, long, long)
        assert ("scan[" in str(jaxpr)) == scans


def test_what_cannot_be_served_is_refused():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.inputs((2, 2, 8, 2, 1, 8, 8)))
    for mix, name in ((taylor.taylor_chunked, "taylor_chunked"), (self_gate.self_gate_attention, "self_gate")):
        with pytest.raises(ValueError, match=f"'{name}' .* a window of 5"):
            mix(q, k, v, mask=Mask(window=5))
    for mix in (taylor.taylor_chunked, self_gate.self_gate_attention, softmax.softmax_attention):
        with pytest.raises(ValueError, match=r"begins of shape \(1, 8\) with queries of batch and length \(2, 8\)"):
            mix(q, k, v, mask=Mask(jnp.zeros((1, 8), jnp.int32)))
    with pytest.raises(ValueError, match="begins of shape"):
        reference.softmax_weights(q, k, Mask(jnp.zeros((2, 7), jnp.int32)))
    with pytest.raises(ValueError, match="a window of 0"):
        Mask(window=0)
