"""The dense definitions: against loops written from the equations, and what every map must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import grouped, reference

FORMS = sorted(oracle.WEIGHTS)


def _by_hand(form: str, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The rows of one head's map, one at a time, from the equations."""
    length, dh = q.shape
    rows = np.zeros((length, length))
    for i in range(length):
        past = k[: i + 1]
        x = past @ q[i] / np.sqrt(dh)
        if form == "softmax":
            w = np.exp(x)
        elif form == "taylor":
            w = 1 + x + x**2 / 2
        elif form == "self_gate":
            silu = q[: i + 1] / (1 + np.exp(-q[: i + 1]))
            w = np.exp((silu * past).sum(-1) / np.sqrt(dh))
        else:
            orders = [np.ones(i + 1)]
            for u, least in ((x, 1e-2), (past**2 @ q[i] ** 2 / dh, 1e-4)):
                d = u.sum()
                bound = least * (i + 1)
                delta = 0 if abs(d) >= bound else (bound if d >= 0 else -bound) - d
                orders.append(u + delta / (i + 1))
            w = sum(u / u.sum() for u in orders)
        rows[i, : i + 1] = w / w.sum()
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_map_is_the_equation(form):
    q, k, _, _ = oracle.inputs((2, 2, 13, 4, 2, 4, 4), seed=1)
    with jax.enable_x64(True):
        got = np.asarray(oracle.WEIGHTS[form](jnp.asarray(q), jnp.asarray(k)))
    assert got.dtype == np.float64 and got.shape == (2, 4, 13, 13)
    for b in range(2):
        for h in range(4):
            # float64 in another order of summation; near-zero first-order sums magnify it up to a hundredfold.
            np.testing.assert_allclose(got[b, h], _by_hand(form, q[b, :, h], k[b, :, h // 2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_sum_to_one_and_see_no_future(form, dtype):
    q, k, _, _ = oracle.inputs((2, 2, 40, 4, 2, 8, 8), seed=2)
    weights = jax.jit(oracle.WEIGHTS[form])(jnp.asarray(q, dtype), jnp.asarray(k, dtype))
    assert weights.dtype == jnp.float32
    assert (np.asarray(weights)[..., ~np.tri(40, dtype=bool)] == 0).all()
    # Guarded first-order weights are as large as |x| / 1e-2, so their float32 sum is off by a hundred roundings.
    tolerance = 2e-5 if form == "taylor_diagonal" else 1e-6
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=tolerance)


def test_self_gate_map_survives_falling_and_rising_scores():
    # silu(q) = q where q is large; scores from +2000 down to -2000 and back: one global maximum gives 0 / 0 early rows.
    scores = np.concatenate([np.linspace(-2000, 2000, 9), np.linspace(2000, -2000, 9)])
    q = np.full((1, 18, 1, 1), 50.0, np.float32)
    k = (scores / 50).astype(np.float32).reshape(1, 18, 1, 1)
    weights = np.asarray(reference.self_gate_weights(jnp.asarray(q), jnp.asarray(k)))[0, 0]
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)  # float32 rounding of eighteen terms
    # Rising by 500 a step, the newest takes all; then it is the two that share the top.
    assert (weights[np.arange(9), np.arange(9)] == 1).all()
    np.testing.assert_allclose(weights[17, 8:10], 0.5, atol=1e-6)


def test_apply_weights_folds_a_shared_map_and_never_repeats_it():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.inputs((1, 3, 24, 4, 2, 4, 6), seed=3))
    weights = reference.softmax_weights(q, k)
    want = np.einsum("hls,bshd->blhd", np.asarray(weights)[0], np.repeat(np.asarray(v), 2, axis=2))
    np.testing.assert_allclose(reference.apply_weights(weights, v), want, atol=1e-5)  # float32 sums, entries below 4
    shapes = {x.aval.shape for e in jax.make_jaxpr(reference.apply_weights)(weights, v).eqns for x in e.outvars}
    assert not any(s.count(24) == 2 and 3 in s for s in shapes)


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 2, 3, 3, 2, 4, 4), "3 query heads"), ((2, 3, 3, 2, 2, 4, 4), "batch")]
)
def test_heads_and_batches_that_do_not_fit_are_refused(shape, message):
    q, k, v, _ = oracle.inputs(shape)
    with pytest.raises(ValueError, match=message):
        grouped.split_values(v, q.shape[0])
        grouped.split_queries(q, k.shape[2])
