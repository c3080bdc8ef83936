"""The divergence from a teacher's distributions against float64, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.kernels.cross_entropy import cross_entropy
from deconstruct.kernels.kl_divergence import kl_divergence

BATCH, LENGTH, SIZE, TEACHERS_SIZE, VOCAB, PADDED = 3, 12, 8, 5, 37, 128


def draw(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = scale * jax.random.normal(keys[0], (BATCH, LENGTH, SIZE))
    table = jax.random.normal(keys[1], (PADDED, SIZE))
    teacher_hidden = scale * jax.random.normal(keys[2], (BATCH, LENGTH, TEACHERS_SIZE))
    teacher_table = jax.random.normal(keys[3], (PADDED, TEACHERS_SIZE))
    weights = jax.random.uniform(keys[4], (BATCH, LENGTH)).round(1)
    return hidden, table, teacher_hidden, teacher_table, weights


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def oracle(hidden, table, teacher_hidden, teacher_table, weights, temperature):
    """float64: the divergence, and its gradients with respect to hidden and table, by the chain rule from
    d/dz_v sum_u p_u log q_u = (p_v - q_v) / T."""
    h, w, ht, wt, weights = (np.asarray(x, np.float64) for x in (hidden, table, teacher_hidden, teacher_table, weights))
    log_q, log_p = (log_softmax(x @ y[:VOCAB].T / temperature) for x, y in ((h, w), (ht, wt)))
    value = temperature**2 * (weights * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum()
    d_logits = temperature**2 * weights[..., None] * (np.exp(log_q) - np.exp(log_p)) / temperature
    d_table = np.zeros_like(w)
    d_table[:VOCAB] = np.einsum("blv,bld->vd", d_logits, h)
    return value, d_logits @ w[:VOCAB], d_table


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (1.0, 2.5), (30.0, 1.0)])  # logits up to about 300
def test_values_and_gradients(chunks, scale, temperature):
    arrays = draw(scale)
    want, d_hidden, d_table = oracle(*arrays, temperature)

    def loss(hidden, table):
        return 2.0 * kl_divergence(hidden, table, *arrays[2:], VOCAB, chunks, temperature)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays[:2])
    # A logit of 300 is rounded by 2e-5, and its probability by as much, relatively.
    np.testing.assert_allclose(value, 2 * want, rtol=1e-5)
    np.testing.assert_allclose(loss(*arrays[:2]), 2 * want, rtol=1e-5)  # the path that is not differentiated
    np.testing.assert_allclose(gradients[0], 2 * d_hidden, atol=1e-4 * np.abs(d_hidden).max())
    np.testing.assert_allclose(gradients[1], 2 * d_table, atol=1e-4 * np.abs(d_table).max())
    assert np.all(np.asarray(gradients[1])[VOCAB:] == 0)  # padded ids learn nothing


def test_it_vanishes_where_both_agree_and_nowhere_else():
    hidden, table, _, _, weights = draw()
    value, gradients = jax.value_and_grad(
        lambda h, w: kl_divergence(h, w, hidden, table, weights, VOCAB, 3, 1.0), (0, 1)
    )(hidden, table)
    assert value == 0 and all(np.all(np.asarray(x) == 0) for x in gradients)
    assert kl_divergence(hidden, 1.01 * table, hidden, table, weights, VOCAB, 3, 1.0) > 0


def test_a_teacher_that_is_sure_is_cross_entropy():
    """All weight on one id: KL(p || q) = -log q there."""
    hidden, table, _, _, weights = draw()
    targets = jax.random.randint(jax.random.key(9), (BATCH, LENGTH), 0, VOCAB)
    sure = 1e4 * jax.nn.one_hot(targets, PADDED)
    got = kl_divergence(hidden, table, sure, jnp.eye(PADDED), weights, VOCAB, 4, 1.0)
    np.testing.assert_allclose(got, cross_entropy(hidden, table, targets, weights, VOCAB, 4), rtol=1e-5)


def test_bfloat16_matmul_inputs_keep_a_float32_divergence():
    arrays = draw()
    rounded = [x.astype(jnp.bfloat16) for x in arrays[:4]]
    want, _, _ = oracle(*rounded, arrays[4], 1.0)
    got = kl_divergence(rounded[0], arrays[1], rounded[2], arrays[3], arrays[4], VOCAB, 1, 1.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)  # the inputs are rounded alike; the rest is float32
