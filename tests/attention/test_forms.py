"""Every registered form: its weights are what its facts say, and mix is its weights. What else it owes: test_check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.attention.registry import FORMS
from deconstruct.attention.variants import VARIANTS  # noqa: F401  registers the forms
from deconstruct.kernels import reference
from deconstruct.kernels.mask import CAUSAL
from tests.tiny import quick, tiny_config

LENGTH, HEADS, HEAD_DIM, HIDDEN = 22, 4, 8, 16
# taylor_diagonal's entries reach 100 where its guard holds a denominator of 1e-2: 100 x float32 rounding. What divides
# by no small sums keeps to a tenth of that with room.
NEAR = 1e-4


@functools.cache
def config(kv_heads):
    return tiny_config({"hidden_size": HEADS * HEAD_DIM, "num_heads": HEADS, "num_kv_heads": kv_heads}).model


def make(name, kv_heads=HEADS, impl="auto", **options):
    """A form whose own parameters are anything but what they are at first."""
    form = FORMS[name](config(kv_heads), nnx.Rngs(params=0), **options)
    form.impl = impl
    noise = iter(jax.random.split(jax.random.key(9), 100))
    nnx.update(form, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), nnx.state(form)))
    return form


def draw(form, seed, qk_batch, batch, kv_heads, length=LENGTH):
    """q, k, v, what the form reads, and a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (qk_batch, length, HEADS, HEAD_DIM))
    k = jax.random.normal(keys[1], (qk_batch, length, kv_heads, HEAD_DIM))
    v = jax.random.normal(keys[2], (batch, length, kv_heads, HEAD_DIM))
    read = form.read(jax.random.normal(keys[3], (qk_batch, length, HEADS * HEAD_DIM)))
    return q, k, v, read, jax.random.normal(keys[4], (batch, length, HEADS, HEAD_DIM))


@pytest.fixture(params=list(FORMS))
def name(request):
    return request.param


@pytest.mark.parametrize("kv_heads", quick([HEADS, 2], [2]))
def test_weights_are_causal_and_what_the_facts_say(name, kv_heads):
    form = make(name, kv_heads)
    q, k, _, read, _ = draw(form, 0, 2, 2, kv_heads)
    weights = np.asarray(form.weights(q, k, CAUSAL, **read))
    assert weights.shape == (2, HEADS, LENGTH, LENGTH) and weights.dtype == jnp.float32
    assert np.all(weights[..., np.triu(np.ones((LENGTH, LENGTH), bool), 1)] == 0)
    if form.normalised:
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=NEAR)
    else:
        assert np.abs(weights.sum(-1) - 1).max() > 1e-2  # a form that says it is not normalised is not
    beyond = np.tri(LENGTH, k=-(form.reach or LENGTH), dtype=bool)
    assert np.all(weights[..., beyond] == 0)


@pytest.mark.parametrize(("qk_batch", "kv_heads"), quick([(3, 2), (1, 2)], [(3, 2)]))
def test_mix_is_weights_times_values_in_values_and_gradients(name, qk_batch, kv_heads):
    form = make(name, kv_heads)
    q, k, v, read, cotangent = draw(form, 1, qk_batch, 3, kv_heads)

    def fast(q, k, v, read):
        out = form.mix(q, k, v, CAUSAL, **read)
        return jnp.sum(out * cotangent), out

    def plain(q, k, v, read):
        out = reference.apply_weights(form.weights(q, k, CAUSAL, **read), v)
        return jnp.sum(out * cotangent), out

    (_, got), got_grads = jax.jit(jax.value_and_grad(fast, (0, 1, 2, 3), has_aux=True))(q, k, v, read)
    (_, want), want_grads = jax.jit(jax.value_and_grad(plain, (0, 1, 2, 3), has_aux=True))(q, k, v, read)
    # Both are float32; sums run in another order. Gradients of taylor_diagonal carry 1/denominator^2, hence the scale.
    np.testing.assert_allclose(got, want, rtol=NEAR, atol=NEAR)
    for g, w in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, atol=NEAR * float(jnp.abs(w).max()))
