"""Every pair of source and form, and every other mixer, inside the model it is made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.attention.gated_mlp import attention_parameters
from deconstruct.attention.mixer import Context
from deconstruct.attention.parameters import mixer_parameters
from deconstruct.attention.variants import find_variant, make_mixer
from deconstruct.costs import accounting
from deconstruct.layers import rope_tables
from deconstruct.model.language_model import build_model
from deconstruct.types import Streams
from tests.tiny import MIXER_NAMES, PARTS_AND_CROSSED, PARTS_QUICKLY, quick, tiny_config

LENGTH = 7


def context(config, static):
    cos, sin = rope_tables(jnp.arange(LENGTH), config.head_size, config.rope_theta)
    return Context(cos, sin, static)


@pytest.mark.parametrize("name", PARTS_QUICKLY)
def test_causality_by_gradient(name):
    """d out_i / d in_j: not zero for the past and the present, exactly zero for the future; a mixer without maps has
    no past."""
    config = tiny_config({"init_std": 0.5}).model
    mixer = make_mixer(name, config, nnx.Rngs(params=0))
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[1], (1, LENGTH, config.hidden_size))

    def out(h):
        streams = Streams(h, x if mixer.fixed_source else None)
        static = streams if mixer.reads_static else Streams(None)
        return mixer(streams, static, context(config, static)).h.sum(axis=(0, 2))

    h = jax.random.normal(keys[0], (1, LENGTH, config.hidden_size))
    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(out))(h))).sum(axis=(1, 3))  # [out position, in position]
    past, future = np.tril_indices(LENGTH, -1), np.triu_indices(LENGTH, 1)
    assert np.all(jacobian[future] == 0)
    assert np.all(np.diag(jacobian) > 0)
    distance = past[0] - past[1]
    seen = distance < (mixer.reach or LENGTH)
    assert np.all(jacobian[past][~seen] == 0) and np.all(jacobian[past][seen] > 0)
    assert mixer.reach == 1 or seen.any()


@pytest.mark.parametrize("name", quick(PARTS_AND_CROSSED, ["hidden/gated_linear", "fixed_text/softmax", "mlp"]))
def test_maps_depend_on_the_batch_unless_the_source_is_fixed(name):
    config = tiny_config({"init_std": 0.3}, variant=name, layout="uniform").model
    model = build_model(config, seed=1)
    tokens = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, config.vocab_size)
    maps = jax.jit(lambda t: model.attention_maps(t))(tokens)
    assert len(maps) == config.num_layers
    for layer in maps:
        if layer is None:
            assert find_variant(name).mixer is not None  # a source and a form always have a map
        elif find_variant(name).source is None or find_variant(name).source.fixed:
            assert layer.shape == (1, config.num_heads, LENGTH, LENGTH)
        else:
            assert layer.shape == (3, config.num_heads, LENGTH, LENGTH)
            assert float(jnp.abs(layer[0] - layer[1]).max()) > 1e-4
    if any(layer is not None for layer in maps):
        if model.stack.layer(0).mixer.normalised:
            np.testing.assert_allclose(maps[0].sum(-1), 1.0, atol=1e-4)  # float32; see test_forms
        moved = float(jnp.abs(maps[0] - maps[1]).max())
        assert moved > 1e-4  # each layer has its own W_Q and W_K


@pytest.mark.parametrize("block", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", quick([4, 2], [2]))
@pytest.mark.parametrize("head_dim", quick([0, 6], [6]))
def test_parameters_equal_standards(block, kv_heads, head_dim):
    """Exactly, for every pair that owns no parameters; to the nearest width of its MLP for one that does, and for
    another mixer."""
    for name in MIXER_NAMES:
        sizes = {"block": block, "num_kv_heads": kv_heads, "head_dim": head_dim, "num_layers": 1}
        config = tiny_config(sizes, variant=name).model
        more = mixer_parameters(config, name) - mixer_parameters(config, "standard")
        left = accounting.difference_from_standard(config)
        assert left == more - 3 * config.hidden_size * round(more / (3 * config.hidden_size)), name
        unmatched = dataclasses.replace(config, match_parameters=False)
        assert accounting.difference_from_standard(unmatched) == more, name
    sizes = {"hidden_size": 896, "num_heads": 8, "num_kv_heads": kv_heads * 2, "head_dim": 32 * head_dim}
    config = tiny_config({"block": block, **sizes}, variant="mlp").model
    standard = mixer_parameters(config, "standard")
    assert standard == attention_parameters(config)
    assert abs(accounting.difference_from_standard(config)) / config.num_layers < 1e-3 * standard


@pytest.mark.parametrize(("size", "width"), [((768, 12), 1025), ((512, 8), 684), ((896, 14), 1196)])
def test_mlp_width_of_the_paper(size, width):
    d, heads = size
    config = tiny_config({"hidden_size": d, "num_heads": heads}, variant="mlp").model
    mixer = nnx.eval_shape(lambda: make_mixer("mlp", config, nnx.Rngs(params=0)))
    assert mixer.width == width
    assert accounting.difference_from_standard(config) == config.num_layers * (3 * d * width - 4 * d * d - 3 * d)
