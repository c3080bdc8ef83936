"""A layer that sees the future is refused before a run begins."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.attention import trial
from deconstruct.attention.form import Form
from deconstruct.attention.mixer import Mixer
from deconstruct.attention.registry import FORMS, MIXERS, register_form, register_mixer
from deconstruct.attention.trial import first_leak, sees_the_future
from deconstruct.attention.variants import one_of_each
from deconstruct.distributed.mesh import make_mesh
from deconstruct.kernels import reference
from deconstruct.layers import constant_param
from deconstruct.train import loop
from deconstruct.types import Streams, UserError
from tests.tiny import quick, tiny_config


class Peek(Form):
    """Sees one position ahead, by a gate that is closed at first; wants what a form may want of its options."""

    name = "peek"

    def __init__(self, config, rngs, *, size: int = 256):
        self.gate = constant_param(0.0, (config.num_heads,), ("heads",))
        self.size = size

    def weights(self, q, k, mask, **read):
        length = q.shape[1]
        seen = mask.dense(length, length)
        causal = jax.nn.softmax(jnp.where(seen, reference.logits(q, k), -jnp.inf), -1)
        return causal + self.gate[...][None, :, None, None] * jnp.eye(length, k=1)[None, None]


class Wide(Form):
    """Runs at a width of its own alone."""

    name = "wide"
    ahead = 0

    def __init__(self, config, rngs):
        if config.hidden_size < 64:
            raise UserError("wide wants a width of 64")

    def weights(self, q, k, mask, **read):
        length = q.shape[1]
        return jnp.broadcast_to(jnp.eye(length, k=self.ahead)[None, None], (q.shape[0], q.shape[2], length, length))


class WideAhead(Wide):
    name = "wide_ahead"
    ahead = 2


class Never(Mixer):
    name = "never"

    def __init__(self, config, rngs):
        self.scale = constant_param(1.0, (config.hidden_size,), (None,))

    def __call__(self, streams, static, context):
        raise TypeError("it runs in a model of three layers only")

    def flops(self, batch, length):
        raise NotImplementedError


class Mean(Never):
    name = "mean"

    def __call__(self, streams, static, context):
        return Streams(*(x if x is None else jnp.broadcast_to(x.mean(1, keepdims=True), x.shape) for x in streams))


@pytest.fixture(autouse=True)
def registered():
    for form in (Peek, Wide, WideAhead):
        register_form(form)
    for mixer in (Never, Mean):
        register_mixer(mixer)
    yield
    for form in (Peek, Wide, WideAhead):
        del FORMS[form.name]
    for mixer in (Never, Mean):
        del MIXERS[mixer.name]


def test_a_run_of_a_form_that_sees_the_future_is_refused_and_nothing_written(prepared, tmp_path):
    config = tiny_config({"vocab_size": 0}, variant="hidden/peek(size=64)", layout="even", data=str(prepared))
    message = (
        r"^variant 'hidden/peek\(size=64\)': position 0 changes when position 1 does: it sees the future; "
        r"dc.check\('hidden/peek\(size=64\)'\) says more$"
    )
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", quick([*one_of_each(), "static_embedding/taylor"], ["standard", "rnd_emb_qk", "mlp"]))
def test_the_packages_own_see_no_future(name):
    assert sees_the_future(name, tiny_config({"num_kv_heads": 2}).model) is None


def test_the_answer_does_not_depend_on_the_mesh_around_it():
    config = tiny_config().model
    with jax.set_mesh(make_mesh(tiny_config(mesh={"data": 2, "tensor": 2}).mesh)):
        assert sees_the_future("hidden/peek", config) == (0, 1)
        assert sees_the_future("mean", dataclasses.replace(config, fixed_length=12)) == (0, 11)
        assert jax.sharding.get_abstract_mesh().size == 8


def test_a_form_that_does_not_run_small_is_tried_as_wide_as_it_is(caplog):
    wide = dataclasses.replace(tiny_config().model, hidden_size=64, dtype="bfloat16")
    assert sees_the_future("wide", wide) is None
    assert sees_the_future("wide_ahead", wide) == (0, 2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_one_that_runs_nowhere_is_not_refused_but_named(caplog):
    assert sees_the_future("never", tiny_config().model) is None
    assert "variant 'never': not checked for the future" in caplog.text
    assert "(TypeError: it runs in a model of three layers only)" in caplog.text


def test_the_first_leak_is_named_with_the_nearest_future_it_sees():
    changed = np.zeros((6, 5), bool)  # changed[p, i]
    changed[2, 3] = changed[3, 3] = True  # what changed itself may change
    assert first_leak(changed) is None
    changed[4, 3] = changed[3, 2] = changed[4, 2] = True
    assert first_leak(changed) == (2, 4)


def test_parameters_that_are_zero_at_first_hide_nothing():
    config = tiny_config().model
    gate = trial.Trial(trial.find_variant("hidden/peek"), config).state[0]["form"]["gate"]
    assert float(jnp.abs(gate).min()) > 0
    assert not np.any(nnx.state(Peek(config, nnx.Rngs(0)))["gate"][...])
