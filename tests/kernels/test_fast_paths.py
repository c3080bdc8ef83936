"""Every fast path against the float64 definition: values and gradients of q, k and v under a random cotangent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import query_chunks, self_gate, softmax, taylor, taylor_diagonal


def _out(stateful, **options):
    return lambda q, k, v: stateful(q, k, v, **options)[0]


# Small chunks, so that short sequences cross several of them and end in a ragged one.
PATHS = {
    "softmax": ("softmax", functools.partial(softmax.softmax_attention, chunk=32)),
    "taylor_quadratic": ("taylor", functools.partial(taylor.taylor_quadratic, chunk=32)),
    "taylor_chunked": ("taylor", _out(taylor.taylor_chunked, chunk=32)),
    "taylor_diagonal": ("taylor_diagonal", _out(taylor_diagonal.taylor_diagonal_attention, chunk=32)),
    "self_gate": ("self_gate", _out(self_gate.self_gate_attention, chunk=32)),
}


# The longest, whose maps are one for the batch, at once; the others in `make proof`.
SHAPES = [pytest.param(s, marks=() if s is oracle.SHAPES[2] else pytest.mark.proof) for s in oracle.SHAPES]


@functools.cache
def _wanted(form, shape):
    return oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), oracle.inputs(shape), "float64")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients(path, shape):
    form, mix = PATHS[path]
    got = oracle.value_and_gradients(mix, oracle.inputs(shape), "float32")
    # The first order of taylor_diagonal divides by sums as small as 1e-2 i, squared in the gradient.
    tolerance = 40 * oracle.FLOAT32 if form == "taylor_diagonal" else oracle.FLOAT32
    oracle.assert_all_near(got, _wanted(form, shape), tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_float64_inputs_stay_float64(path):
    form, mix = PATHS[path]
    shape = oracle.SHAPES[0]
    got = oracle.value_and_gradients(mix, oracle.inputs(shape), "float64")
    # 2e-16 and the same magnification as above, with room: anything computed in float32 would be off by 1e-7.
    oracle.assert_all_near(got, _wanted(form, shape), 1e-10)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 2, 130, 4, 2, 32, 32), "float32"), ((1, 3, 100, 4, 2, 8, 8), "bfloat16")], ids=str
)
def test_self_gate_with_grouped_queries_on_cpus_without_avx512(shape, dtype):
    """XLA's CPU backend of jax 0.10.2 ended the process on these (and on the third of oracle.SHAPES) where the CPU has
    AVX2 without AVX-512: in a sum over one axis of a product of arrays of seven axes. CPUs that do not show it can
    still see that there is no such sum."""
    form, mix = PATHS["self_gate"]
    q, k, v, g = (jnp.asarray(x, dtype) for x in oracle.inputs(shape))

    def backward(q, k, v, g):
        return jax.vjp(mix, q, k, v)[1](g)

    text = jax.jit(backward).lower(q, k, v, g).as_text()
    sums = [line for line in text.splitlines() if "stablehlo.reduce(" in line]
    assert sums and max(line.rpartition("(tensor<")[2].partition(">")[0].count("x") for line in sums) <= 6
    arrays = tuple(np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, g))
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")
    # As in `test_values_and_gradients` and `test_bfloat16`.
    tolerance = {"float32": oracle.FLOAT32, "bfloat16": 2e-2}[dtype]
    oracle.assert_all_near(oracle.value_and_gradients(mix, arrays, dtype), want, tolerance)


@pytest.mark.parametrize("path", [p for p in PATHS if p != "taylor_diagonal"])
def test_bfloat16(path):
    # The inputs are rounded first, for both, so that only the path's own roundings are seen: weights, outputs and the
    # cotangents of logits, each by 2^-9 = 2e-3; a handful of them stays below 2 % of the largest entry.
    form, mix = PATHS[path]
    shape = (1, 3, 100, 4, 2, 8, 8)
    arrays = tuple(
        np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64) for x in oracle.inputs(shape)
    )
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")
    oracle.assert_all_near(oracle.value_and_gradients(mix, arrays, "bfloat16"), want, 2e-2)


def test_bfloat16_taylor_diagonal_with_sums_away_from_zero():
    # Positive q and k, where the form is well conditioned; the bound is the one above.
    form, mix = PATHS["taylor_diagonal"]
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in oracle.inputs((2, 2, 100, 4, 2, 8, 8)))
    arrays = tuple(np.asarray(x, np.float64) for x in (abs(q), abs(k), v, g))
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")
    oracle.assert_all_near(oracle.value_and_gradients(mix, arrays, "bfloat16"), want, 2e-2)


def test_softmax_with_extreme_logits():
    form, mix = PATHS["softmax"]
    q, k, v, g = oracle.inputs((1, 2, 100, 2, 2, 8, 4), seed=5)
    q, k = (x.astype(np.float32).astype(np.float64) for x in (40 * q, 40 * k))
    logits = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(8)
    assert logits.max() > 1e3 and logits.min() < -1e3
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), (q, k, v, g), "float64")
    got = oracle.value_and_gradients(mix, (q, k, v, g), "float32")
    # A logit of 5e3 in float32 is off by up to 1e-3 after eight products, and its exponential by as much, relatively.
    oracle.assert_all_near(got, want, 2e-3)


@pytest.mark.parametrize("levels", [(-1500, 1500, 0, 1510, -1500), (1500, -1500, 1495, 0, 3000)], ids=["up", "down"])
def test_self_gate_with_extreme_scores(levels):
    """Plateaus at levels thousands apart, with noise of order one on them, so that no row is without competition."""
    form, mix = PATHS["self_gate"]
    rng = np.random.default_rng(6)
    scores = np.repeat(levels, 20)[None, :, None] + rng.normal(size=(1, 100, 2))
    # Where q is large silu(q) is q, and 50 * k is the score (dh = 1).
    k = (scores / 50).astype(np.float32).astype(np.float64)[..., None]
    q = np.full_like(k, 50)
    v, g = rng.normal(size=(2, 2, 100, 2, 4))
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), (q, k, v, g), "float64")
    assert np.abs(want[2]).max() > 10  # the gradient of k is there: 50 times that of the scores
    got = oracle.value_and_gradients(mix, (q, k, v, g), "float32")
    # A score of 3e3 is off by 1.2e-4 in float32, and its exponential by as much, relatively.
    oracle.assert_all_near(got, want, 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_future_has_no_part_in_the_past(path):
    q, k, v, g = oracle.inputs((1, 2, 50, 2, 1, 4, 4), seed=6)
    g[:, :20], g[:, 21:] = 0, 0
    _, _, dk, dv = oracle.value_and_gradients(PATHS[path][1], (q, k, v, g), "float32")
    for gradient in (dk, dv):
        assert (gradient[:, 21:] == 0).all()
        assert (np.abs(gradient[:, :21]).max((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("path", ["softmax", "taylor_quadratic"])
def test_recomputed_backward_is_the_kept_one(path, monkeypatch):
    arrays = oracle.inputs(oracle.SHAPES[1], seed=7)
    kept = oracle.value_and_gradients(PATHS[path][1], arrays, "float32")
    monkeypatch.setattr(query_chunks, "KEEP_LENGTH", 1)
    jaxpr = str(jax.make_jaxpr(PATHS[path][1])(*arrays[:3]))
    assert "remat" in jaxpr or "checkpoint" in jaxpr
    # The same operations on the same numbers; only the compiler's fusions may differ.
    oracle.assert_all_near(oracle.value_and_gradients(PATHS[path][1], arrays, "float32"), kept, 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_shared_map_is_formed_once(path):
    """With Bq = 1 < Bv = 5, nothing but results and states has the batch of the values."""
    q, k, v, g = (jnp.asarray(x, jnp.float32) for x in oracle.inputs((1, 5, 64, 2, 2, 4, 4)))
    compiled = jax.jit(jax.grad(lambda *a: (PATHS[path][1](*a) * g).sum(), argnums=(0, 1, 2)))
    text = compiled.lower(q, k, v).as_text()
    assert "32x" in text
    for dims in (part.split("x") for part in text.replace("<", ">").split(">") if part.endswith("xf32")):
        # A map of chunk 32 against 32 or 64 keys: both axes side by side at the end, and 5 in front.
        assert not (dims[-3:-1] in (["32", "32"], ["32", "64"]) and "5" in dims[:-3]), dims


@pytest.mark.proof
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("taylor_chunked", "float32"),
        ("taylor_chunked", "bfloat16"),
        ("taylor_diagonal", "float32"),
        ("self_gate", "float32"),
    ],
)
def test_long_sequences(path, dtype):
    """Chunked sums over 4096 positions against the float64 map; q and k positive, so no order cancels by chance."""
    form = PATHS[path][0]
    mix = {
        "taylor_chunked": _out(taylor.taylor_chunked),
        "taylor_diagonal": _out(taylor_diagonal.taylor_diagonal_attention),
        "self_gate": _out(self_gate.self_gate_attention),
    }[path]
    q, k, v, g = oracle.inputs((1, 1, 4096, 1, 1, 4, 2), seed=8)
    arrays = tuple(np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in (abs(q), abs(k), v, g))
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), arrays, "float64")
    # float32 sums of 4096 terms of mixed sign; bf16 as in `test_bfloat16`.
    oracle.assert_all_near(
        oracle.value_and_gradients(mix, arrays, dtype), want, {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    )


def test_taylor_attention_takes_the_cheaper_form():
    assert not taylor.chunked_is_cheaper(2048, 64)
    assert taylor.chunked_is_cheaper(16384, 64)
    assert taylor.chunked_is_cheaper(2048, 4)
    assert not taylor.chunked_is_cheaper(64, 4)
    short, long = (jax.ShapeDtypeStruct((1, n, 1, 4), jnp.float32) for n in (64, 2048))
    assert "scan" not in str(jax.make_jaxpr(taylor.taylor_attention)(short, short, short))
    assert "scan" in str(jax.make_jaxpr(taylor.taylor_attention)(long, long, long))


def _vanishing():
    """Keys in pairs k, -k: every even row's first-order sum is exactly zero; and zero queries, for both orders."""
    q, k, v, g = oracle.inputs((1, 2, 40, 2, 2, 4, 4), seed=9)
    q, k = q.astype(np.float32).astype(np.float64), k.astype(np.float32).astype(np.float64)
    k[:, 1::2] = -k[:, 0::2]
    q[:, 30:33] = 0
    return q, k, v, g


def test_taylor_diagonal_guard():
    q, k, v, g = _vanishing()
    x = np.einsum("blhd,bshd->bhls", q, k) / 2
    sums = np.where(np.tri(40, dtype=bool), x, 0).sum(-1)
    assert (np.abs(sums) < 1e-2 * np.arange(1, 41)).mean() >= 0.5
    with jax.enable_x64(True):
        weights = np.asarray(oracle.WEIGHTS["taylor_diagonal"](jnp.asarray(q), jnp.asarray(k)))
    # Sums of up to 40 weights of size |x| / (1e-2 i), in float64.
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights[:, :, 31, :32], 1 / 32, rtol=1e-12)
    form, mix = PATHS["taylor_diagonal"]
    # Rows of exactly zero sum may round to either side of zero, where the form jumps: in float64 the sums of the pairs
    # are exact on both sides, since x and -x cancel whatever their rounding.
    want = oracle.value_and_gradients(oracle.definition(oracle.WEIGHTS[form]), (q, k, v, g), "float64")
    got = oracle.value_and_gradients(mix, (q, k, v, g), "float64")
    oracle.assert_all_near(got, want, 1e-10)
