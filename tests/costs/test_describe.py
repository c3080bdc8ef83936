"""What a configuration is, in numbers that can be checked by hand."""

import gc

import jax
import pytest

from deconstruct.costs import accounting
from deconstruct.costs.describe import as_text, describe
from deconstruct.model.language_model import build_model
from tests.tiny import quick, tiny_config


@pytest.mark.parametrize("name", quick(["standard", "fixed_seq_qk", "mlp"], ["fixed_seq_qk"]))
def test_the_numbers_are_those_of_the_model_that_is_built(name):
    config = tiny_config({"num_layers": 4, "num_kv_heads": 2}, variant=name, layout="even")
    found = describe(config)
    assert found["layers"] == [name, "standard"] * 2
    assert found["plan"] == (
        [{"unit": ["standard"], "repeats": 4}] if name == "standard" else [{"unit": [name, "standard"], "repeats": 2}]
    )
    built = build_model(config.model)
    assert found["parameters"]["total"] == accounting.count(built)
    assert found["parameters"]["embedding"] == 128 * 16
    assert found["parameters"]["mixer_per_layer"] == [accounting.count(built.stack.layer(i).mixer) for i in range(4)]
    assert found["difference_from_standard"] == sum(found["mixer_difference_per_layer"])
    assert found["mixer_difference_per_layer"][1::2] == [0, 0]
    assert found["vocabulary"] == {"size": 40, "padded": 128} and found["tokens_per_step"] == 8 * 12
    layer = found["per_layer"]
    assert sum(layer["cache_bytes"]) == found["cache_bytes"] and len(layer["activation_bytes"]) == 4
    head = 2 * 12 * 16 * 128
    assert sum(layer["forward_flops"]) + head == found["flops"]["forward"] == found["flops"]["prefill"] + head * 11 / 12
    assert sum(layer["decode_flops"]) + head / 12 == found["flops"]["decode"]
    assert as_text(found).count("\n") == 10 + 3


def test_flops_of_standard_by_hand():
    config = tiny_config({"num_layers": 1})  # d 16, 4 heads of 4, MLP of 24, 128 padded ids, 12 tokens
    flops = describe(config, batch=3)["flops"]
    matmuls = 2 * 3 * 12 * (128 * 16 + 3 * 16 * 24 + 4 * 16 * 16)
    attention = 2 * 3 * 12 * 12 * (16 + 16)  # q k and weights v, every cell of the map
    assert flops["forward_dense"] == matmuls + attention
    assert flops["forward"] == matmuls + attention / 2
    assert flops["train"] == 3 * flops["forward"] and flops["train_dense"] == 3 * flops["forward_dense"]


def test_an_untied_head_is_an_embedding_too():
    tied, untied = (describe(tiny_config({"tie_embeddings": tie}))["parameters"] for tie in (True, False))
    assert untied["embedding"] == 2 * tied["embedding"]
    assert untied["total"] - tied["total"] == tied["embedding"]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("standard", lambda batch, length: 2 * batch * length * 16 * 4),
        ("rnd_emb_qk", lambda batch, length: (1 + batch) * length * 16 * 4),
        ("mlp", lambda batch, length: 0),
    ],
)
def test_cache_bytes_by_hand(name, by_hand):
    config = tiny_config({"num_layers": 1}, variant=name).model
    for batch, length in ((1, 12), (3, 12), (3, 24)):
        assert accounting.cache_bytes(config, batch, length) == by_hand(batch, length)


@pytest.mark.parametrize("name", ["approximate", "non_approximate"])
def test_a_recurrent_state_does_not_grow_with_length(name):
    config = tiny_config({"num_layers": 1}, variant=name).model
    short, long = (accounting.cache_bytes(config, 2, length) for length in (12, 1200))
    assert 0 < short == long


def test_nothing_is_allocated():
    """Of a model of 10 GB."""
    config = tiny_config({"hidden_size": 4096, "intermediate_size": 16_384, "num_layers": 10, "num_heads": 32})
    gc.collect()  # what other tests have left
    before = len(jax.live_arrays())
    assert describe(config)["parameters"]["total"] > 2.5e9
    assert len(jax.live_arrays()) == before


def test_peak_flops():
    assert accounting.peak_flops(jax.devices()[0]) is None  # not known for a CPU
