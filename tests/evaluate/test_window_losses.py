"""Windows cover a text, and perplexity is what the logits say."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh, single_device_mesh
from deconstruct.evaluate.window_losses import Result, WindowLosses, windows
from deconstruct.model.language_model import build_model
from deconstruct.types import UserError
from tests.tiny import tiny_config

CASES = [
    (length, context, stride)
    for length in (0, 1, 2, 3, 8, 9, 10, 17, 31)
    for context, stride in ((1, 1), (4, 4), (4, 1), (4, 3), (8, 8), (8, 5), (8, 1), (16, 16), (40, 40), (40, 7))
]


@pytest.mark.parametrize(("length", "context", "stride"), CASES)
def test_windows_score_every_token_but_the_first_exactly_once(length, context, stride):
    stream = np.arange(100, 100 + length)  # a token says where it stands
    scored = []
    for number, (row, weights) in enumerate(windows(stream, context, stride)):
        assert row.shape == (context + 1,) and row.dtype == np.int32
        assert weights.shape == (context,) and weights.dtype == np.float32
        counted = np.flatnonzero(weights)
        assert len(counted) and set(weights[counted]) == {1.0}
        targets, inputs = row[1:][counted], row[:-1]
        # Each target follows the token before it, and the window begins where it should.
        assert np.array_equal(targets, inputs[counted] + 1)
        assert row[0] == 100 + number * stride
        if number:  # seen with at least this much context
            assert counted[0] >= context - stride
        scored += list(targets)
    assert scored == list(range(101, 100 + length))


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_config({"init_std": 0.5}, variant="non_approximate", layout="even").model, seed=3)


def by_hand(model, stream, context, stride):
    """In float64 from the logits of one window after the other, as its definition reads."""
    forward = jax.jit(lambda tokens: model(tokens))
    total, count, done = 0.0, 0, 0
    for start in range(0, len(stream) - 1, stride):
        window = stream[start : start + context + 1]
        padded = np.zeros((1, context), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(forward(padded), np.float64)[0, : len(window) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, target in enumerate(window[1:]):
            if start + i >= done:  # not scored before
                total, count, done = total - log_p[i, target], count + 1, start + i + 1
    return total / count, count


@pytest.mark.parametrize(
    ("context", "stride", "devices"),
    [
        (8, 8, 8),  # 13 windows of which the last has 3 tokens: two batches of 8, the second with 3 rows of padding
        (8, 3, 1),
    ],
)
def test_perplexity_is_what_the_logits_say(model, context, stride, devices):
    stream = np.random.default_rng(0).integers(0, 40, 100).astype(np.int32)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1)) if devices == 8 else single_device_mesh()
    with jax.set_mesh(mesh):
        result = WindowLosses(mesh, tokens_per_batch=8 * context)(model, stream, context, stride)
    nll, count = by_hand(model, stream, context, stride)
    assert result.tokens == count == 99
    # float32 logits and losses of the program, against their sums in float64.
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert abs(nll - math.log(40)) > 0.1  # not what any model at all would say


def test_a_program_is_compiled_once(model, caplog):
    """For all checkpoints of a shape, at one context; the last, ragged batch included."""
    stream = np.random.default_rng(1).integers(0, 40, 60).astype(np.int32)
    losses = WindowLosses(single_device_mesh(), tokens_per_batch=32)
    compiled, values = [], []
    for live in (model, build_model(model.config, seed=4)):
        caplog.clear()
        with jax.log_compiles():
            values.append(losses(live, stream, 8, 8).nll)
        compiled.append([r for r in caplog.records if "Compiling jit(losses)" in r.getMessage()])
    assert (len(compiled[0]), len(compiled[1])) == (1, 0)
    assert values[0] != values[1]


def test_context_beyond_the_fixed_stream_names_both():
    config = tiny_config(variant="rnd_emb_qk", layout="even").model
    losses = WindowLosses(single_device_mesh())
    message = r"--contexts=13: the fixed stream \(fixed_random\) of this model has only 12 positions"
    with pytest.raises(UserError, match=message):
        losses(build_model(config), np.arange(30), 13, 13)
    free = dataclasses.replace(config, layers=("standard", "standard"))
    assert losses(build_model(free), np.arange(30), 13, 13).tokens == 29


def test_a_text_without_a_token_to_score(model):
    for count in (0, 1):
        with pytest.raises(UserError, match=f"the text has {count} tokens; two are needed"):
            WindowLosses(single_device_mesh())(model, np.arange(count), 8, 8)


def test_a_hopeless_loss_has_a_perplexity():
    assert Result(np.full(3, math.log(7.0))).perplexity == pytest.approx(7.0, rel=1e-12)  # float64
    assert math.isfinite(Result(np.full(3, 1e4)).perplexity)


def test_a_context_beyond_the_text_is_the_whole_text(model):
    """And takes no more memory: a window of 2**40 tokens would not fit anywhere."""
    losses, stream = WindowLosses(single_device_mesh()), np.arange(1, 12, dtype=np.int32)
    whole = losses(model, stream, 10, 10).losses.tolist()
    for stride in (2**40, 7):
        assert losses(model, stream, 2**40, stride).losses.tolist() == whole
