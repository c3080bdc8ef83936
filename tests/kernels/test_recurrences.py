"""The recurrent forms against the paper's recurrences, written token by token in float64.

Equations of arXiv:2510.11602, appendix I. Nothing here comes from the package: sums are carried as the paper carries
them, where the package's definitions are dense maps and its fast paths work in chunks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from deconstruct.attention.form import Shape
from deconstruct.attention.variants import find_variant
from deconstruct.config import ModelConfig
from deconstruct.kernels import reference

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 300, 4, 2, 8


def taylor_recurrence(q, k, v):
    """Equations 14 to 17 for one head, without a guard: o_i = o0_i + o1_i + o2_i, each order normalised by itself."""
    sum_v, sum_k, sum_k2 = np.zeros(v.shape[1]), np.zeros(k.shape[1]), np.zeros(k.shape[1])
    sum_kv, sum_k2v = np.zeros((k.shape[1], v.shape[1])), np.zeros((k.shape[1], v.shape[1]))
    outs = []
    for i in range(len(q)):
        half_k2, half_q2 = k[i] ** 2 / np.sqrt(2), q[i] ** 2 / np.sqrt(2)
        sum_v, sum_k, sum_k2 = sum_v + v[i], sum_k + k[i], sum_k2 + half_k2
        sum_kv, sum_k2v = sum_kv + np.outer(k[i], v[i]), sum_k2v + np.outer(half_k2, v[i])
        o0 = sum_v / (i + 1)
        o1 = q[i] @ sum_kv / (q[i] @ sum_k)
        o2 = half_q2 @ sum_k2v / (half_q2 @ sum_k2)
        outs.append(o0 + o1 + o2)
    return np.array(outs)


def gate_recurrence(q, k, v):
    """Equations 7, 8 and 18 for one head: a running weighted mean; the weights relative to the largest so far."""
    highest, total, weighted = -np.inf, 0.0, np.zeros(v.shape[1])
    outs = []
    for i in range(len(q)):
        score = (q[i] / (1 + np.exp(-q[i]))) @ k[i] / np.sqrt(q.shape[1])
        rescale, highest = np.exp(highest - max(highest, score)), max(highest, score)
        total = total * rescale + np.exp(score - highest)
        weighted = weighted * rescale + np.exp(score - highest) * v[i]
        outs.append(weighted / total)
    return np.array(outs)


def by_head(recurrence, q, k, v):
    groups = HEADS // KV_HEADS
    out = np.zeros((BATCH, LENGTH, HEADS, v.shape[-1]))
    for b in range(BATCH):
        for h in range(HEADS):
            out[b, :, h] = recurrence(q[b, :, h], k[b, :, h // groups], v[b, :, h // groups])
    return out


def draw(case):
    q, k, v, _ = oracle.inputs((BATCH, BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM), seed=len(case))
    if case == "self_gate, extreme":
        return 12 * q, 12 * k, v  # scores of several hundred, either sign
    if case == "taylor_diagonal":
        return abs(q), abs(k), v  # sums away from zero, where the guard that the paper does not have never acts
    return q, k, v


# What each is, and how the paper's output is to be scaled: the mean of the three orders here, their sum there.
CASES = {
    "taylor_diagonal": (taylor_recurrence, 1 / 3),
    "self_gate": (gate_recurrence, 1),
    "self_gate, extreme": (gate_recurrence, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_the_recurrence(case):
    recurrence, factor = CASES[case]
    q, k, v = draw(case)
    want = factor * by_head(recurrence, q, k, v)
    with jax.enable_x64(True):
        weights = oracle.WEIGHTS[case.split(",")[0]](jnp.asarray(q), jnp.asarray(k))
        got = np.asarray(reference.apply_weights(weights, jnp.asarray(v)))
    oracle.assert_near(got, want, 1e-12)  # float64, summed in another order


@pytest.mark.parametrize("case", CASES)
def test_mixing_and_decoding_are_the_recurrence(case):
    recurrence, factor = CASES[case]
    q, k, v = draw(case)
    want = factor * by_head(recurrence, q, k, v)
    form = find_variant(case.split(",")[0]).form(ModelConfig(), nnx.Rngs(params=0))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    # A score of 600 in float32 is off by 600 x 2^-24 = 4e-5, and so is the weight it gives.
    tolerance = 1e-4 if "extreme" in case else oracle.FLOAT32
    oracle.assert_near(np.asarray(jax.jit(form.mix)(q, k, v)), want, tolerance)
    cache = form.init_cache(Shape(BATCH, BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM), jnp.float32)
    extend = jax.jit(form.extend)
    outs = []
    for i in range(LENGTH):
        here = slice(i, i + 1)
        out, cache = extend(q[:, here], k[:, here], v[:, here], cache)
        outs.append(np.asarray(out))
    oracle.assert_near(np.concatenate(outs, axis=1), want, tolerance)


def test_the_guard_acts_only_where_a_sum_is_near_zero():
    """With q and k of either sign, the rows whose first-order sum is large enough are still the paper's."""
    q, k, v = draw("taylor_diagonal, any sign")
    want = by_head(taylor_recurrence, q, k, v) / 3
    with jax.enable_x64(True):
        weights = reference.taylor_diagonal_weights(jnp.asarray(q), jnp.asarray(k))
        got = np.asarray(reference.apply_weights(weights, jnp.asarray(v)))
    keys = np.repeat(np.cumsum(k, axis=1), HEADS // KV_HEADS, axis=2)
    mean = (q * keys).sum(-1) / np.sqrt(HEAD_DIM) / np.arange(1, LENGTH + 1)[:, None]
    free = np.abs(mean) >= reference.GUARD
    assert 0.5 < free.mean() < 1
    np.testing.assert_allclose(got[free], want[free], rtol=1e-9, atol=1e-9)  # magnified by up to 1 / GUARD
    assert np.abs(got[~free] - want[~free]).max() > 1e-3
