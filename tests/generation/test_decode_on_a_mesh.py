"""Decoding over eight devices: parameters and caches are split, and the tokens are those of one device."""

import jax
import numpy as np
import pytest
from flax import nnx

from deconstruct.config import MeshConfig
from deconstruct.data import tokenizer
from deconstruct.generation.generator import Generator, Request, Settings
from deconstruct.model.decode import Decoder, cache_axes
from deconstruct.model.language_model import build_model
from deconstruct.model.placement import abstract_arrays, mesh_for, split_model
from tests.tiny import PARTS, quick, tiny_config

MESHES = [(1, 4, 2), (2, 2, 2), (1, 8, 1)]
PROMPTS = [[5, 6, 7], [9, 1, 2, 3, 4], [30, 8], [11, 12, 13, 14]]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return tokenizer.train_sentencepiece(["fog and sea and ship and lamp "] * 20, 270, tmp_path_factory.mktemp("t"))


def model_of(name, **sizes):
    sizes = {"scan": False, "init_std": 0.3, "num_kv_heads": 2, "num_layers": 1, **sizes}
    return build_model(tiny_config(sizes, variant=name, layout="uniform", sequence_length=16).model, seed=1)


def placed(model, sizes):
    """The same model over eight devices."""
    graphdef, *arrays = split_model(model)
    _, *abstract = abstract_arrays(model.config, mesh_for(model.config, MeshConfig(*sizes)))
    on_mesh = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tuple(arrays), tuple(abstract))
    return nnx.merge(graphdef, *on_mesh)


def generated(model, text, prompts):
    requests = [Request("", prompt, 0) for prompt in prompts]
    Generator(model, text, Settings(max_new_tokens=6)).generate(requests)
    return [request.output for request in requests]


def check_tokens(name, text, meshes):
    model = model_of(name, vocab_size=text.vocab_size)
    want = generated(model, text, PROMPTS)
    assert len({tuple(output) for output in want}) > 1
    for sizes in meshes:
        assert generated(placed(model, sizes), text, PROMPTS) == want, sizes


@pytest.mark.parametrize("name", quick(PARTS, ["fixed_random/softmax"]))
def test_the_same_tokens(name, text):
    check_tokens(name, text, MESHES[:1])


@pytest.mark.proof
@pytest.mark.parametrize("name", ["fixed_random/softmax", "hidden/gated_linear"])
def test_the_same_tokens_on_other_meshes_and_of_one_prompt(name, text):
    check_tokens(name, text, MESHES[1:])
    model = model_of(name, vocab_size=text.vocab_size)
    alone = generated(model, text, PROMPTS[:1])  # a batch of one divides over no devices
    assert generated(placed(model, (1, 4, 2)), text, PROMPTS[:1]) == alone


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("hidden/softmax", [(("batch", "kv_heads"), None, None)] * 2),
        ("fixed_random/softmax", [(("kv_heads",), None, None), (("kv_heads",), None, ("batch",))]),
        ("hidden/self_gate", [(("batch",), ("kv_heads",))] * 2 + [(("batch",), ("kv_heads",), None)]),
        ("mlp", []),
    ],
)
def test_what_the_axes_of_a_cache_grow_with(name, axes):
    def is_axes(node):
        return isinstance(node, tuple) and not hasattr(node, "_fields") and node != ()

    found = cache_axes(tiny_config(variant=name, layout="uniform").model, name)
    assert [entry for entry in jax.tree.leaves(found, is_leaf=is_axes) if entry] == axes


def test_a_cache_is_split_over_all_devices():
    model = placed(model_of("hidden/softmax"), (1, 4, 2))
    _, cache, _ = Decoder(model, 4, 16).prefill(np.ones((4, 3), np.int32))
    for x in jax.tree.leaves(cache.layers):
        if x.ndim:
            assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] // 8
