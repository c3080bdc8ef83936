"""The ring of the last keys and values: whatever the pieces, what one pass under the window gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import reference, softmax, taylor
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.ring_cache import init_ring_cache, windowed_extend

# The same is asked of the forms in tests/attention; here of the kernels, at more shapes.
pytestmark = pytest.mark.proof

LENGTH = 22
# Borders on and off those of pieces of seven, and a document of one position.
STARTS = ((0, 7, 8, 18), (0, 3))


def _extend(weighing, window, made_for=None):
    @functools.partial(jax.jit, static_argnames="room")
    def extend(q, k, v, cache, begins, room=None):
        if cache is None:  # made inside, so that the program knows that it is empty
            shape = (q.shape[0], v.shape[0], room, made_for or window, k.shape[2], k.shape[3], v.shape[3])
            cache = init_ring_cache(*shape, k.dtype)
        return windowed_extend(q, k, v, cache, Mask(begins, window), weighing, chunk=5)

    return extend


@pytest.mark.parametrize(
    ("shape", "window", "documents"),
    [
        ((2, 2, LENGTH, 4, 2, 4, 6), 6, True),
        ((2, 2, LENGTH, 4, 2, 4, 6), 30, True),
        ((1, 3, LENGTH, 2, 2, 4, 4), 5, False),
        ((1, 3, LENGTH, 2, 2, 4, 4), 1, False),
    ],
    ids=str,
)
def test_pieces_equal_one_pass(shape, window, documents):
    begins = oracle.begins(STARTS, LENGTH) if documents else None
    mask = Mask(None if begins is None else jnp.asarray(begins), window)
    arrays = oracle.inputs(shape, seed=31)
    masked = oracle.definition(lambda q, k: reference.softmax_weights(q, k, mask))
    want = oracle.value_and_gradients(masked, arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    extend = _extend(softmax.SOFTMAX, window)
    caches = []
    # The first piece into a cache that is known to be empty, or (None) into one that is not.
    for prompt, piece in ((LENGTH, 1), (9, 1), (None, 7), (None, 1), (3, 7)):
        cache = init_ring_cache(shape[0], shape[1], LENGTH, window, *k.shape[2:], v.shape[-1], jnp.float32)
        assert cache.is_new and cache.k.shape[1] == min(window, LENGTH)
        # What is not yet written is large, so that reading it would be seen.
        cache = cache._replace(k=jnp.full_like(cache.k, 1e4), v=jnp.full_like(cache.v, 1e4))
        ends = [prompt or 0, *range((prompt or 0) + piece, LENGTH, piece), LENGTH]
        outs = []
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            if first == last:
                continue
            given = cache if outs or not prompt else None
            here = None if begins is None else begins[:, first:last] - first
            if here is not None and piece == 7:  # however far back a first document is said to have begun
                here = np.where(begins[:, first:last] == 0, -1000, here).astype(np.int32)
            part = (x[:, first:last] for x in (q, k, v))
            out, cache = extend(*part, given, here, room=LENGTH if given is None else None)
            outs.append(np.asarray(out))
        oracle.assert_near(np.concatenate(outs, axis=1), want, oracle.FLOAT32)
        assert not cache.is_new and int(cache.length) == LENGTH
        caches.append(cache)
    for other in caches[1:]:
        for a, b in zip(other, caches[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_taylor_over_a_ring_that_was_made_for_a_larger_window():
    arrays = oracle.inputs((1, 1, LENGTH, 2, 1, 4, 4), seed=32)
    masked = oracle.definition(lambda q, k: reference.taylor_weights(q, k, Mask(window=6)))
    want = oracle.value_and_gradients(masked, arrays, "float64")[0]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    extend = _extend(taylor.TAYLOR, 6, made_for=9)
    first, cache = extend(q[:, :13], k[:, :13], v[:, :13], None, None, room=LENGTH)
    outs = [first]
    for i in range(13, LENGTH):
        out, cache = extend(*(x[:, i : i + 1] for x in (q, k, v)), cache, None)
        outs.append(out)
    oracle.assert_near(np.concatenate(outs, axis=1), want, oracle.FLOAT32)


def test_a_decoded_token_is_written_in_place():
    """Donated, the ring comes back in its own buffers, and nothing of its size is made besides."""
    cache = init_ring_cache(2, 2, 4096, 512, 2, 16, 16, jnp.float32)._replace(length=jnp.int32(700))
    q, k, v = (jnp.zeros((2, 1, heads, 16)) for heads in (4, 2, 2))
    step = jax.jit(windowed_extend, donate_argnums=3, static_argnames=("weighing", "chunk"))
    memory = step.lower(q, k, v, cache, Mask(window=512)).compile().memory_analysis()
    ring = cache.k.nbytes + cache.v.nbytes
    assert memory.alias_size_in_bytes >= ring
    assert memory.temp_size_in_bytes < ring / 2


def test_what_does_not_fit_is_refused():
    q, k, v, _ = (jnp.asarray(x) for x in oracle.inputs((1, 1, 2, 1, 1, 4, 4)))
    cache = init_ring_cache(1, 1, 8, 4, 1, 4, 4, k.dtype)
    with pytest.raises(ValueError, match="the mask has none"):
        windowed_extend(q, k, v, cache, Mask())
    with pytest.raises(ValueError, match="begins of shape"):
        windowed_extend(q, k, v, cache, Mask(jnp.zeros((1, 3), jnp.int32), 4))
