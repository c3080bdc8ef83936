"""Layouts, plans, scan, remat, restacking and skipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.layout import LAYOUTS
from deconstruct.model.language_model import abstract_model, build_model
from deconstruct.model.placement import split_model
from deconstruct.model.restack import rename_layers, to_layers, to_segments
from deconstruct.plan import plan, slots, unrolled
from deconstruct.run.restore import skipped
from tests.tiny import tiny_config, todays_programs

LAYERS = 8


def hybrid(layout, variant="non_approximate", layers=LAYERS, **model):
    return tiny_config({"num_layers": layers, **model}, variant=variant, layout=layout).model


def drawn(config, seed=0):
    """Parameters of a model, drawn without compiling anything."""
    _, params = nnx.split(abstract_model(config), nnx.Param, ...)[:2]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), nnx.to_pure_dict(params))


def loss_and_gradients(config, seed=0):
    graphdef, params, frozen = split_model(build_model(config, seed))
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, config.vocab_size)

    def loss(params):
        model = nnx.merge(graphdef, params, frozen)
        return model.loss(tokens[:, :-1], tokens[:, 1:], jnp.ones((2, 12)))

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, to_layers(params, config.plan), to_layers(gradients, config.plan)


@pytest.mark.proof
@todays_programs  # bit for bit
@pytest.mark.parametrize(
    ("layout", "variant", "layers"),
    [
        ("even", "rnd_emb_qk", 4),
        ("bilateral", "mlp", 8),
        ("bottom", "fixed_seq_qk", 8),
        ("1,5", "static_emb_qk", 8),
    ],
)
def test_scanned_and_unrolled_are_the_same_model(layout, variant, layers):
    """The same initial state bit for bit; outputs and gradients up to float32 rounding of fused sums."""
    scanned = hybrid(layout, variant, layers)
    loop = dataclasses.replace(scanned, scan=False)
    assert sum(len(segment.unit) for segment in scanned.plan) < layers
    loss, params, gradients = loss_and_gradients(scanned)
    loop_loss, loop_params, loop_gradients = loss_and_gradients(loop)
    jax.tree.map(np.testing.assert_array_equal, params, loop_params)
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, loop_gradients)


@pytest.mark.proof
def test_a_mixed_layout_keeps_layers_in_order():
    """Four kinds of layer, folded and not, agree: a layer in the wrong place would change the loss."""
    names = ["standard", "mlp", "approximate", "static_embedding/self_gate"] * 2
    config = tiny_config({"num_layers": 8}, layout=",".join(names)).model
    assert [len(s.unit) for s in config.plan] == [4]
    loss, _, gradients = loss_and_gradients(config)
    loop_loss, _, loop_gradients = loss_and_gradients(dataclasses.replace(config, scan=False))
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-6)  # float32 rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, loop_gradients)


@pytest.mark.proof
@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_gradient(scan):
    config = hybrid("even", layers=4, scan=scan)
    rematted = dataclasses.replace(config, remat=True)
    graphdef, params, frozen = split_model(build_model(rematted))
    tokens = jnp.zeros((1, 5), jnp.int32)
    jaxprs = [
        str(jax.make_jaxpr(lambda p, g=g: nnx.merge(g, p, frozen).hidden(tokens)[0])(params))
        for g in (graphdef, split_model(build_model(config))[0])
    ]
    assert "remat" in jaxprs[0] and "remat" not in jaxprs[1]
    _, _, plain = loss_and_gradients(config)
    _, _, again = loss_and_gradients(rematted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, again)  # float32 rounding


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_restacking_goes_there_and_back(layout):
    config = hybrid(layout)
    params = drawn(config)
    by_layer = to_layers(params, config.plan)
    assert set(by_layer["layers"]) == {str(i) for i in range(LAYERS)}
    other = unrolled(config.layers)
    there = to_layers(to_segments(by_layer, other), other)
    jax.tree.map(np.testing.assert_array_equal, there, by_layer)
    jax.tree.map(np.testing.assert_array_equal, to_segments(by_layer, config.plan), params)


def test_restacking_reaches_trees_inside_trees():
    config = hybrid("even")
    params = drawn(config)
    nested = {"mu": params, "count": jnp.zeros(())}
    saved = to_layers(nested, config.plan)
    assert "layers" in saved["mu"] and "count" in saved
    jax.tree.map(np.testing.assert_array_equal, to_segments(saved, config.plan), nested)


@pytest.mark.proof
def test_skip_keeps_the_right_layers():
    config = hybrid("even", "mlp")
    small, kept = skipped(config, "block")
    assert kept == (1, 3, 5, 7) and small.layers == ("standard",) * 4 and small.num_layers == 4
    branchless, all_layers = skipped(config, "mixer")
    assert all_layers == tuple(range(8)) and branchless.without_mixers and branchless.layers == config.layers

    model = build_model(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    streams, context = model.start(tokens)
    for i in kept:  # by hand: only the standard blocks, one after the other
        streams = model.stack.layer(i)(streams, context)
    _, params, frozen = split_model(model)
    by_layer = rename_layers(to_layers(params, config.plan), {old: new for new, old in enumerate(kept)})
    graphdef, _, _ = split_model(build_model(small))
    shortened = nnx.merge(graphdef, to_segments(by_layer, small.plan), frozen)
    # float32 rounding between fused and eager programs.
    np.testing.assert_allclose(shortened.hidden(tokens)[0], model.norm(streams.h), atol=1e-5)


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["uniform", "even"])
def test_the_program_does_not_grow_with_depth(layout):
    def lines(layers):
        config = tiny_config({"num_layers": layers}, variant="mlp", layout=layout).model
        graphdef, params, frozen = split_model(build_model(config))
        tokens = jnp.zeros((2, 8), jnp.int32)
        weights = jnp.ones((2, 8))
        loss = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p, frozen).loss(tokens, tokens, weights)))
        return len(loss.lower(params).as_text().splitlines())

    assert lines(24) == lines(6)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("layers", [6, 12, 24, 28])
def test_plans_cover_every_layer_once_and_stay_small(layout, layers):
    config = tiny_config({"num_layers": layers}, variant="mlp", layout=layout).model
    folded = plan(config.layers)
    where = slots(folded)
    names = tuple(folded[p.segment].unit[p.position] for p in where)
    assert names == config.layers and len(set(where)) == layers
    assert len(folded) <= 3 and sum(len(segment.unit) for segment in folded) <= 4
