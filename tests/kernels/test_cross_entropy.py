"""Cross-entropy in chunks against float64, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.kernels.cross_entropy import chunk_count, cross_entropy, token_losses

BATCH, LENGTH, SIZE, VOCAB, PADDED = 3, 12, 8, 37, 128


def draw(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = scale * jax.random.normal(keys[0], (BATCH, LENGTH, SIZE))
    table = jax.random.normal(keys[1], (PADDED, SIZE))
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB)
    weights = jax.random.uniform(keys[3], (BATCH, LENGTH)).round(1)
    return hidden, table, targets, weights


def oracle(hidden, table, targets, weights):
    """float64: the loss, and its gradients with respect to hidden and table."""
    hidden, table, weights = (np.asarray(x, np.float64) for x in (hidden, table, weights))
    logits = hidden @ table[:VOCAB].T
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    lse = np.log(p.sum(-1)) + top[..., 0]
    p /= p.sum(-1, keepdims=True)
    nll = lse - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    d_logits = weights[..., None] * (p - np.eye(VOCAB)[np.asarray(targets)])
    d_table = np.zeros_like(table)
    d_table[:VOCAB] = np.einsum("blv,bld->vd", d_logits, hidden)
    return nll, (weights * nll).sum(), d_logits @ table[:VOCAB], d_table


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # logits up to about 1e3
def test_values_and_gradients(chunks, scale):
    hidden, table, targets, weights = draw(scale)
    nll, want, d_hidden, d_table = oracle(hidden, table, targets, weights)

    def loss(hidden, table):
        return 2.0 * cross_entropy(hidden, table, targets, weights, VOCAB, chunks)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, table)
    # A logit of 1e3 is rounded by 6e-5, and its probability by as much, relatively.
    np.testing.assert_allclose(value, 2 * want, rtol=1e-5)
    np.testing.assert_allclose(loss(hidden, table), 2 * want, rtol=1e-5)  # the path that is not differentiated
    np.testing.assert_allclose(gradients[0], 2 * d_hidden, atol=2e-4 * np.abs(d_hidden).max())
    np.testing.assert_allclose(gradients[1], 2 * d_table, atol=2e-4 * np.abs(d_table).max())
    assert np.all(np.asarray(gradients[1])[VOCAB:] == 0)  # padded ids learn nothing
    np.testing.assert_allclose(token_losses(hidden, table, targets, VOCAB, chunks), nll, rtol=1e-4, atol=1e-4 * scale)


def test_bfloat16_matmul_inputs_keep_a_float32_loss():
    hidden, table, targets, weights = draw()
    _, want, _, _ = oracle(hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16), targets, weights)
    got = cross_entropy(hidden.astype(jnp.bfloat16), table, targets, weights, VOCAB, 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)  # the inputs are rounded alike; the rest is float32


def test_chunks_divide_the_sequence_and_bound_the_logits():
    assert chunk_count(2, 512, 128) == 1
    chunks = chunk_count(256, 2048, 50_304)
    assert 2048 % chunks == 0 and 256 * (2048 // chunks) * 50_304 <= 1 << 26
    assert chunk_count(1 << 20, 7, 1 << 20) == 7  # never less than one position
