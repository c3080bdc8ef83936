"""Every registered form: its weights are what its facts say, and mix and extend are its weights, whatever the impl."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.attention.form import Shape
from deconstruct.attention.registry import FORMS
from deconstruct.attention.variants import VARIANTS  # noqa: F401  registers the forms
from deconstruct.kernels import reference
from deconstruct.kernels.mask import CAUSAL, Mask
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


SOME = quick(list(FORMS), ["softmax", "taylor"])  # what compiles longest is run for the others by `make proof`


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


@pytest.mark.parametrize(("qk_batch", "kv_heads"), quick([(3, HEADS), (3, 2), (1, HEADS), (1, 2)], [(3, 2)]))
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


def extended(form, q, k, v, read, chunk, mask=CAUSAL):
    """As decoding does it: the first positions in a program that holds the new cache, the rest in one that is given
    it."""
    shape = Shape(v.shape[0], q.shape[0], LENGTH, HEADS, k.shape[2], HEAD_DIM, HEADS * HEAD_DIM)
    empty = form.init_cache(shape, jnp.float32)
    extend = jax.jit(form.extend)

    def part(x, begin, end):
        return jax.tree.map(lambda x: x[:, begin:end], x)

    def masked(begin, end):
        return mask if mask.begins is None else Mask(part(mask.begins, begin, end) - begin)

    end = min(chunk, LENGTH)
    first = jax.jit(lambda q, k, v, mask, read: form.extend(q, k, v, empty, mask, **read))
    out, cache = first(*part((q, k, v), 0, end), masked(0, end), part(read, 0, end))
    parts = [out]
    for begin in range(end, LENGTH, chunk):
        end = min(begin + chunk, LENGTH)
        out, cache = extend(*part((q, k, v), begin, end), cache, masked(begin, end), **part(read, begin, end))
        parts.append(out)
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("impl", "qk_batch"), quick([("auto", 2), ("auto", 1), ("reference", 2)], [("auto", 2)]))
def test_extending_in_chunks_is_one_pass(name, qk_batch, impl):
    form = make(name, 2, impl)
    q, k, v, read, _ = draw(form, 2, qk_batch, 2, 2)
    whole = form.mix(q, k, v, CAUSAL, **read)
    for chunk in (LENGTH, 7, 1):
        # float32 sums in another order; see above for the scale.
        np.testing.assert_allclose(extended(form, q, k, v, read, chunk), whole, rtol=NEAR, atol=NEAR, err_msg=chunk)


BORDERS = ([0, 5, 6, 15], [0, 1, 14])  # where the documents of each of two packed rows begin


def packed_mask():
    begins = [np.repeat(starts, np.diff([*starts, LENGTH])) for starts in BORDERS]
    return Mask(jnp.asarray(np.stack(begins), jnp.int32))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("impl", ["auto", pytest.param("reference", marks=pytest.mark.proof)])
def test_a_document_in_a_packed_row_is_the_document_alone(name, impl):
    """Outputs and gradients; and a form that serves no documents says so."""
    form = make(name, 2, impl)
    if not form.documents:
        pytest.skip("this form says that it keeps to no borders; its refusal is tested in test_refusals")
    q, k, v, read, cotangent = draw(form, 3, 2, 2, 2)
    mask = packed_mask()

    def loss(q, k, v, read, mask, cotangent):
        out = form.mix(q, k, v, mask, **read)
        return jnp.sum(out * cotangent), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), gradients = both(q, k, v, read, mask, cotangent)
    packed = (out, *jax.tree.leaves(gradients))
    for row, starts in enumerate(BORDERS):
        for begin, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            if (begin, end) not in ((0, 5), (5, 6), (6, 15), (1, 14)):
                continue  # each length is a program
            alone = jax.tree.map(lambda x: x[row : row + 1, begin:end], (q, k, v, read))  # noqa: B023
            (_, out), gradients = both(*alone, CAUSAL, cotangent[row : row + 1, begin:end])
            for got, want in zip(packed, (out, *jax.tree.leaves(gradients)), strict=True):
                scale = max(1.0, float(jnp.abs(want).max()))
                np.testing.assert_allclose(got[row : row + 1, begin:end], want, atol=NEAR * scale)
    for chunk in (LENGTH, 7, 1):
        got = extended(form, q, k, v, read, chunk, mask)
        np.testing.assert_allclose(got, packed[0], rtol=NEAR, atol=NEAR, err_msg=chunk)
