"""window: a band of softmax, against a masked softmax in float64; a cache that does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.attention.form import Shape
from deconstruct.attention.variants import find_variant
from deconstruct.costs import accounting, programs
from deconstruct.types import UserError
from tests.attention.test_forms import HEAD_DIM, HEADS, LENGTH, draw, make
from tests.tiny import quick, tiny_config


def masked_softmax(q, k, v, size):
    """Float64, by hand; grouped queries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    x = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])
    i, j = np.indices(x.shape[-2:])
    x = np.where((j <= i) & (i - j < size), x, -np.inf)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v)


def extended(form, q, k, v, chunk):
    """As decoding does it: some positions, then the next."""
    shape = Shape(v.shape[0], q.shape[0], LENGTH, HEADS, k.shape[2], HEAD_DIM, HEADS * HEAD_DIM)
    first = jax.jit(lambda q, k, v: form.extend(q, k, v, form.init_cache(shape, jnp.float32)))
    extend = jax.jit(form.extend)
    pieces = [tuple(x[:, begin : begin + chunk] for x in (q, k, v)) for begin in range(0, LENGTH, chunk)]
    out, cache = first(*pieces[0])
    parts = [out]
    for piece in pieces[1:]:
        out, cache = extend(*piece, cache)
        parts.append(out)
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("size", quick([1, 5, 22, 100], [5]))
def test_it_is_a_masked_softmax(size):
    """Mixed, and extended all at once, by sevens and token by token, smaller and larger than the sequence."""
    form = make("window", 2, size=size)
    q, k, v, _, _ = draw(form, 4, 2, 2, 2)
    want = masked_softmax(q, k, v, size)
    np.testing.assert_allclose(jax.jit(form.mix)(q, k, v), want, atol=2e-6)  # float32 rounding of order one
    for chunk in (22, 7, 1):
        np.testing.assert_allclose(extended(form, q, k, v, chunk), want, atol=2e-6)


def test_a_window_as_wide_as_the_sequence_is_softmax():
    wide, softmax = make("window", 4, size=22), make("softmax", 4)
    q, k, v, _, _ = draw(wide, 5, 2, 2, 4)
    np.testing.assert_allclose(wide.mix(q, k, v), softmax.mix(q, k, v), atol=1e-6)


def test_the_cache_is_a_ring_and_the_work_a_band():
    def at(length):
        config = tiny_config({"num_layers": 1}, variant="hidden/window(size=8)", sequence_length=length).model
        program = programs.mixer_program(config, "hidden/window(size=8)", 1, length)
        return accounting.cache_bytes(config, 2, length), programs.counted_flops(program)

    (short_bytes, short), (long_bytes, long) = at(1024), at(4096)
    assert short_bytes == long_bytes == 2 * 2 * 8 * 16 * 4  # keys and values of 8 positions, float32
    assert long == pytest.approx(4 * short, rel=0.01)
    form = find_variant("window(size=8)").form
    assert form is find_variant("window").form
    shape = Shape(1, 1, 4, 2, 2, 4)
    assert make("window", size=8).flops(shape).needed == 2 * 10 * 2 * 4 * 2  # 10 cells: the whole triangle


def test_options_of_two_layers_may_differ():
    config = tiny_config(layout="hidden/window(size=4),static_embedding/window(size=6)").model
    assert [segment.unit for segment in config.plan] == [config.layers]
    for words, message in (
        ("hidden/window(size=0)", r"size=0: must be at least 1"),
        ("hidden/window(size=4.5)", r"variant 'hidden/window\(size=4.5\)': size=4.5: expected a whole number"),
        ("hidden/window(sise=4)", r"the option sise is unknown; did you mean size\?"),
        ("hidden/window(size=4", r"a parenthesis is not closed"),
        ("hidden/window(4)", r"'4' is not an option; expected option=value"),
        ("hidden/softmax(size=4)", r"the option size is unknown; softmax has no options"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(variant=words)


def test_a_huge_key_outside_the_window_changes_nothing():
    form = make("window", 4, size=5)
    q, k, v, _, _ = draw(form, 6, 1, 1, 4)
    huge = k.at[:, 3].set(1e4)
    before, after = form.mix(q, k, v), form.mix(q, huge, v)
    changed = np.abs(np.asarray(before - after)).max((0, 2, 3)) > 0
    assert changed[3:8].any() and not changed[8:].any() and not changed[:3].any()
    assert bool(jnp.isfinite(after).all())
