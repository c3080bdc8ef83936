"""Decoding with the cache is the full forward pass, for every pair of source and form and the MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.attention.registry import FORMS
from deconstruct.model.decode import Decoder
from deconstruct.model.language_model import build_model
from deconstruct.types import UserError
from tests.tiny import MIXER_NAMES, PAPER_NAMES, quick, tiny_config

LENGTH = 24
PAPER_FORMS = ("softmax", "taylor", "self_gate", "taylor_diagonal")  # the last divides by sums that may vanish
QUICK = ["hidden/gated_delta", "fixed_random/softmax"]


def decode(model, tokens, chunks, cache_length=LENGTH):
    """Logits after each chunk, [chunks, B, V]."""
    decoder = Decoder(model, tokens.shape[0], cache_length)
    logits, cache, _ = decoder.prefill(tokens[:, : chunks[0]])
    start, seen = chunks[0], [logits]
    for chunk in chunks[1:]:
        logits, cache, _ = decoder.extend(tokens[:, start : start + chunk], cache)
        start += chunk
        seen.append(logits)
    return jnp.stack(seen)


@pytest.mark.parametrize("name", quick(MIXER_NAMES, QUICK))
def test_prefill_and_steps_are_the_full_forward_pass(name):
    check_decoding(name, "uniform", {"num_layers": 1})


@pytest.mark.proof
@pytest.mark.parametrize("name", quick(PAPER_NAMES[1:], ["mlp", "fixed_seq_qk"]))
def test_hybrids_decode_alike(name):
    check_decoding(name, "even", {})


def check_decoding(name, layout, sizes):
    sizes = {"init_std": 0.2, "num_kv_heads": 2, **sizes}
    config = tiny_config(sizes, variant=name, layout=layout, sequence_length=LENGTH).model
    model = build_model(config, seed=3)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, config.vocab_size)
    chunks = (9, 1, 7, 7)
    full = jax.jit(lambda t: model(t))(tokens)
    want = full[:, np.cumsum(chunks) - 1].swapaxes(0, 1)
    got = decode(model, tokens, chunks)
    # float32 sums in another order; taylor_diagonal divides by sums that may be near zero.
    tolerance = 1e-3 if "diagonal" in name else 2e-5
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))
    assert float(jnp.abs(want[0] - want[-1]).max()) > 1e-3


@pytest.mark.parametrize("name", quick(["rnd_emb_qk", "hidden/gated_linear", "hidden/window"], ["hidden/window"]))
def test_heads_wider_than_their_share_decode_alike(name):
    """Four heads of 6 in a width of 16, in the block that norms them."""
    check_decoding(name, "even", {"block": "qwen3", "head_dim": 6})


@pytest.mark.proof
@pytest.mark.parametrize("name", [*PAPER_NAMES, *(f"hidden/{name}" for name in FORMS if name not in PAPER_FORMS)])
def test_a_long_cache_that_is_not_full(name):
    """300 steps in a cache of 320."""
    config = tiny_config({"init_std": 0.2}, variant=name, layout="uniform", sequence_length=320).model
    model = build_model(config, seed=1)
    tokens = jax.random.randint(jax.random.key(0), (2, 304), 0, config.vocab_size)
    want = jax.jit(lambda t: model(t))(tokens)[:, 3:].swapaxes(0, 1)
    got = decode(model, tokens, (4, *[1] * 300), cache_length=320)
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))  # float32 sums in another order


@pytest.mark.proof
def test_scanned_and_unrolled_models_decode_alike():
    config = tiny_config({"num_layers": 4, "init_std": 0.2}, variant="non_approximate", layout="even").model
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, config.vocab_size)
    scanned = decode(build_model(config, seed=1), tokens, (3, 1, 2))
    full = build_model(config, seed=1)(tokens)
    np.testing.assert_allclose(scanned[-1], full[:, -1], atol=1e-5)  # float32 rounding


def test_beyond_the_fixed_stream_is_refused_with_both_numbers():
    config = tiny_config(variant="rnd_emb_qk", layout="even", sequence_length=8).model
    with pytest.raises(UserError, match=r"9 tokens are more than the fixed stream .* of this model has: 8"):
        Decoder(build_model(config), 1, 9)
