"""The choice of a program: what auto takes, what is refused and what the message says."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import dispatch, softmax
from deconstruct.types import UserError


@pytest.mark.parametrize("form", sorted(oracle.WEIGHTS))
def test_auto_and_reference_agree(form):
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.inputs((1, 2, 20, 2, 1, 4, 4), seed=21))
    fast, slow = (jax.jit(dispatch.resolve(form, impl))(q, k, v) for impl in ("auto", "reference"))
    # Two float32 programs; taylor_diagonal's small sums magnify, as in test_fast_paths.
    oracle.assert_near(np.asarray(fast), np.asarray(slow), 40 * oracle.FLOAT32)


@pytest.mark.parametrize("platform", [None, "cpu", "gpu", "tpu"])
def test_auto_is_xla_everywhere(platform):
    assert dispatch.resolve("softmax", "auto", platform) is softmax.softmax_attention
    assert dispatch.resolve("softmax", "xla", platform) is softmax.softmax_attention


def test_the_choice_is_logged_once(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            dispatch.resolve("taylor")
        dispatch.resolve("taylor", "reference")
    assert [r.getMessage() for r in caplog.records] == [
        "form taylor runs with impl xla",
        "form taylor runs with impl reference",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("softmax", "flash"), "'flash' is not known; there are auto, reference, xla, cudnn, pallas"),
        (("mine", "auto"), "no kernels for form 'mine'"),
        (("softmax", "pallas"), "'softmax' has no impl 'pallas' yet; it has auto, reference, xla, cudnn"),
        (("taylor", "pallas"), "'taylor' has no impl 'pallas' yet; it has auto, reference, xla$"),
        (("self_gate", "cudnn", "gpu"), "'self_gate' has no impl 'cudnn'"),
        (("softmax", "cudnn", "cpu"), "needs an NVIDIA GPU, and this is cpu"),
        (("softmax", "cudnn", "gpu", "float32"), "bfloat16 or float16, not float32"),
        (("softmax", "cudnn", "gpu", "bfloat16", 60), "multiple of 8 and at most 128, not 60"),
        (("softmax", "cudnn", "cuda", "bfloat16", 256), "not 256"),
    ],
)
def test_refusals_say_why(arguments, message):
    with pytest.raises(UserError, match=message):
        dispatch.resolve(*arguments)


def test_cudnn_checks_what_it_is_called_with():
    kernel = dispatch.resolve("softmax", "cudnn", "gpu", "bfloat16", 64)
    q, k, v, _ = (jnp.asarray(x) for x in oracle.inputs((1, 2, 4, 1, 1, 8, 8)))
    with pytest.raises(UserError, match="one batch, got 1 and 2"):
        kernel(q, k, v)
    with pytest.raises(UserError, match="not float32"):
        kernel(q, k, v[:1])
