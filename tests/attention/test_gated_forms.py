"""gated_linear and gated_delta as forms: their gates are their own, count as parameters, and are read at the source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.attention.parameters import mixer_parameters, mlp_width
from deconstruct.attention.registry import FORMS
from deconstruct.costs.describe import describe
from deconstruct.model.language_model import build_model
from deconstruct.model.placement import decay_mask
from deconstruct.types import UserError
from tests.attention.test_forms import draw, make
from tests.tiny import tiny_config

NAMES = [name for name in ("gated_linear", "gated_delta") if name in FORMS]


@pytest.mark.parametrize("name", NAMES)
def test_without_decay_it_is_linear_attention(name):
    """gated_linear with open gates adds up; gated_delta that writes all of a key it meets again gives the new value."""
    form = make(name)
    q, k, v, read, _ = draw(form, 7, 1, 1, 4, length=6)
    open_gates = {key: jnp.zeros_like(x) for key, x in read.items()} | (
        {"beta": jnp.ones_like(read["beta"])} if "beta" in read else {}
    )
    if name == "gated_linear":
        x = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(8)
        want = np.einsum("bhls,bshd->blhd", np.tril(x), v)
        np.testing.assert_allclose(form.mix(q, k, v, **open_gates), want, atol=1e-5)  # float32 sums of order ten
    else:
        same = jnp.broadcast_to(k[:, :1], k.shape)  # one key: the memory holds the last value written under it
        unit = k[:, :1] / jnp.linalg.norm(k[:, :1], axis=-1, keepdims=True)
        reading = (q / jnp.linalg.norm(q, axis=-1, keepdims=True) * unit).sum(-1, keepdims=True) / np.sqrt(8)
        np.testing.assert_allclose(form.mix(q, same, v, **open_gates), reading * v, atol=1e-4)  # 1e-6 in the norms


@pytest.mark.proof
@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_are_taken_from_the_mlp(name):
    config = tiny_config({"num_layers": 1, "hidden_size": 64, "intermediate_size": 200}, variant=name)
    more = mixer_parameters(config.model, name) - mixer_parameters(config.model, "standard")
    assert more > 0 and mlp_width(config.model, name) == 200 - round(more / (3 * 64))
    found = describe(config)
    assert found["mixer_difference_per_layer"] == [more] and abs(found["difference_from_standard"]) <= 3 * 64 / 2
    model = build_model(config.model)
    assert model.stack.layer(0).mlp.gate_proj.kernel.shape == (64, mlp_width(config.model, name))
    with pytest.raises(UserError, match=rf"match_parameters=true: a layer of {name} has .* parameters more than stand"):
        tiny_config({"num_layers": 1, "hidden_size": 64, "intermediate_size": 1, "num_heads": 8}, variant=name)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_pulls_on_its_matrices_alone(name):
    config = tiny_config(variant=name).model
    mask = decay_mask(config)["stack"]["segments"][0][0]["mixer"]["form"]
    named = {"/".join(str(key.key) for key in path): keep for path, keep in jax.tree_util.tree_leaves_with_path(mask)}
    assert {key.rpartition("/")[2] for key, keep in named.items() if keep} == {"kernel"}
    assert any(not keep for keep in named.values())


@pytest.mark.parametrize("name", NAMES)
def test_strong_gates_forget_and_open_ones_do_not(name):
    form = make(name)
    q, k, v, read, _ = draw(form, 8, 1, 1, 4)
    shut = form.mix(q, k, v, **(read | {"log_decay": jnp.full_like(read["log_decay"], -1e4)}))
    assert bool(jnp.isfinite(shut).all())
    moved = form.mix(q, k, v.at[:, 3].add(1.0), **(read | {"log_decay": jnp.full_like(read["log_decay"], -1e4)}))
    changed = np.abs(np.asarray(moved - shut)).max((0, 2, 3)) > 1e-6
    assert changed[3] and not changed[4:].any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    config = tiny_config({"dtype": "bfloat16", "init_std": 0.1}, variant=name).model
    form = FORMS[name](config, nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 16), jnp.bfloat16)
    assert all(value.dtype == jnp.float32 and bool((value <= 1).all()) for value in form.read(x).values())


def test_a_rank_of_none_is_refused():
    with pytest.raises(UserError, match=r"gated_linear\(rank=0\)': rank=0: must be at least 1"):
        tiny_config(variant="static_embedding/gated_linear(rank=0)")
