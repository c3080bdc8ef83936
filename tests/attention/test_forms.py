"""Every registered form: its weights are a causal map with rows of one, and mix and extend are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.attention.base import FORMS, Shape
from deconstruct.attention.variants import VARIANTS  # noqa: F401  registers the forms
from deconstruct.kernels import reference

LENGTH, HEADS, HEAD_DIM = 22, 4, 8


def draw(seed, qk_batch, batch, kv_heads, length=LENGTH):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (qk_batch, length, HEADS, HEAD_DIM))
    k = jax.random.normal(keys[1], (qk_batch, length, kv_heads, HEAD_DIM))
    v = jax.random.normal(keys[2], (batch, length, kv_heads, HEAD_DIM))
    return q, k, v, jax.random.normal(keys[3], (batch, length, HEADS, HEAD_DIM))


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]()


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_weights_are_causal_and_rows_sum_to_one(form, kv_heads):
    q, k, _, _ = draw(0, 2, 2, kv_heads)
    weights = form.weights(q, k)
    assert weights.shape == (2, HEADS, LENGTH, LENGTH) and weights.dtype == jnp.float32
    above = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert np.all(np.asarray(weights)[..., above] == 0)
    # taylor_diagonal's entries reach 100 where its guard holds a denominator of 1e-2: 100 x float32 rounding.
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1.0, atol=1e-4)


@pytest.mark.parametrize(("qk_batch", "kv_heads"), [(3, HEADS), (3, 2), (1, HEADS)])
def test_mix_is_weights_times_values_in_values_and_gradients(form, qk_batch, kv_heads):
    q, k, v, cotangent = draw(1, qk_batch, 3, kv_heads)

    def fast(q, k, v):
        return jnp.sum(form.mix(q, k, v) * cotangent), form.mix(q, k, v)

    def plain(q, k, v):
        out = reference.apply_weights(form.weights(q, k), v)
        return jnp.sum(out * cotangent), out

    (_, got), got_grads = jax.jit(jax.value_and_grad(fast, (0, 1, 2), has_aux=True))(q, k, v)
    (_, want), want_grads = jax.jit(jax.value_and_grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
    # Both are float32; sums run in another order. Gradients of taylor_diagonal carry 1/denominator^2, hence the scale.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4 * float(jnp.abs(w).max()))


@pytest.mark.parametrize("qk_batch", [2, 1])
@pytest.mark.parametrize("chunk", [LENGTH, 7, 1])
def test_extending_in_chunks_is_one_pass(form, chunk, qk_batch):
    q, k, v, _ = draw(2, qk_batch, 2, 2)
    whole = form.mix(q, k, v)
    empty = form.init_cache(Shape(2, qk_batch, LENGTH, HEADS, 2, HEAD_DIM), jnp.float32)
    # As decoding does it: the first positions in a program that holds the new cache, the rest in one that is given it.
    first, extend = jax.jit(lambda q, k, v: form.extend(q, k, v, empty)), jax.jit(form.extend)
    head = slice(0, chunk)
    out, cache = first(q[:, head], k[:, head], v[:, head])
    parts = [out]
    for start in range(chunk, LENGTH, chunk):
        part = slice(start, min(start + chunk, LENGTH))
        out, cache = extend(q[:, part], k[:, part], v[:, part], cache)
        parts.append(out)
    # float32 sums in another order; see above for the scale.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)
