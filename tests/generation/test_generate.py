"""Generating: the same text as without a cache, prompts of unequal length together, sampling as asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.data import tokenizer
from deconstruct.generation.generator import Generator, Request, Settings
from deconstruct.generation.sampling import Sampling, filtered, penalise
from deconstruct.model.language_model import build_model
from deconstruct.types import UserError
from tests.tiny import PAPER_NAMES, tiny_config

PROMPTS = [[5, 6, 7], [9, 1, 2, 3, 4, 8, 20, 21], [30]]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizer.train_sentencepiece(["fog and sea and ship and lamp "] * 20, 270, folder)


def requests(seed=0):
    return [Request("", prompt, seed + i, i) for i, prompt in enumerate(PROMPTS)]


def tiny_model(name, vocabulary, length=160, layout="even"):
    sizes = {"init_std": 0.3, "scan": False, "vocab_size": vocabulary}
    return build_model(tiny_config(sizes, variant=name, layout=layout, sequence_length=length).model, seed=2)


@pytest.mark.proof
@pytest.mark.parametrize("name", PAPER_NAMES)
def test_greedy_is_the_same_with_and_without_a_cache(name, text):
    """300 tokens each after prompts of unequal length in one batch; every one is what the full forward pass says of
    all before it."""
    model = tiny_model(name, text.vocab_size, length=320, layout="even")
    table = model.embed.embedding[...]
    model.embed.embedding[...] = table.at[text.end_of_text].set(0)  # never the likeliest: nothing ends early
    asked = requests()
    Generator(model, text, Settings(max_new_tokens=300)).generate(asked)
    rows = [request.tokens + request.output for request in asked]
    padded = jnp.array([row + [0] * (310 - len(row)) for row in rows])  # causal: what follows does not matter
    want = np.asarray(jax.jit(lambda tokens: model(tokens).argmax(-1))(padded))
    for request, row, likeliest in zip(asked, rows, want, strict=True):
        start = len(request.tokens)
        assert len(request.output) == 300 and request.stop == "length"
        assert row[start:] == likeliest[start - 1 : len(row) - 1].tolist()
    assert len({tuple(request.output) for request in asked}) == 3


@pytest.mark.proof
def test_a_request_does_not_depend_on_its_company(text):
    """Drawn from its own seed: alone, in a batch, in batches of another size."""
    model = tiny_model("approximate", text.vocab_size)
    drawn = []
    for batch_size in (2, 8):  # two together and one alone, then all three
        asked = requests(seed=7)
        Generator(model, text, Settings(max_new_tokens=10, temperature=1.0, batch_size=batch_size)).generate(asked)
        drawn.append([request.output for request in asked])
    assert drawn[0] == drawn[1]
    other = requests(seed=8)
    Generator(model, text, Settings(max_new_tokens=10, temperature=1.0)).generate(other)
    assert [request.output for request in other] != drawn[0]


def test_stop_strings_cut_the_text_and_pieces_make_it_up(text):
    model = tiny_model("mlp", text.vocab_size)
    whole = requests()
    Generator(model, text, Settings(max_new_tokens=30)).generate(whole)
    stop = next(r.text[4:6] for r in whole if len(r.text) > 8)
    pieces: dict[int, str] = {}
    asked = requests()

    def gather(request, piece):
        pieces[request.sample] = pieces.get(request.sample, "") + piece

    Generator(model, text, Settings(max_new_tokens=30, stop=(stop,))).generate(asked, gather)
    assert any(request.stop == "stop" for request in asked)
    for request, before in zip(asked, whole, strict=True):
        assert stop not in request.text and before.text.startswith(request.text)
        assert pieces.get(request.sample, "") == request.text


def test_filters():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]] * 4))
    sampling = Sampling(
        temperature=jnp.ones(4),
        top_k=jnp.array([2, 0, 0, 1]),
        top_p=jnp.array([1.0, 0.7, 1.0, 0.01]),
        min_p=jnp.array([0.0, 0.0, 0.29, 0.0]),
        penalty=jnp.ones(4),
        seed=jnp.zeros(4, jnp.uint32),
    )
    kept = np.isfinite(np.asarray(filtered(logits, sampling)))
    assert kept.sum(-1).tolist() == [2, 2, 3, 1] and kept[:, 0].all()
    seen = jnp.array([[True, False, False, False]] * 4)
    penalised = penalise(jnp.array([[2.0, 2.0, -2.0, 1.0]] * 4), seen, jnp.full(4, 2.0))
    assert penalised[0].tolist() == [1.0, 2.0, -2.0, 1.0]


def test_draws_follow_the_distribution(text):
    """2000 draws of one token against the model's own probabilities."""
    model = tiny_model("standard", text.vocab_size)
    asked = [Request("", [5, 6], seed) for seed in range(2000)]
    Generator(model, text, Settings(max_new_tokens=1, temperature=1.0, batch_size=2000)).generate(asked)
    want = jax.nn.softmax(model(jnp.array([[5, 6]]))[0, -1])
    # An end of text is no output: it is counted by its own name.
    tokens = [request.output[0] if request.output else text.end_of_text for request in asked]
    found = np.bincount(tokens, minlength=text.vocab_size) / len(tokens)
    # Standard deviation of a share is at most 0.5 / sqrt(2000) = 0.011.
    assert np.abs(found - np.asarray(want)).max() < 0.05


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "the prompt is empty"), ([1, 999], "prompt token 999 is unknown"), ([1] * 30, "more than the fixed stream")],
)
def test_prompts_that_cannot_be_taken(tokens, message, text):
    model = tiny_model("rnd_emb_qk", text.vocab_size, length=32)
    with pytest.raises(UserError, match=message):
        Generator(model, text, Settings(max_new_tokens=10)).generate([Request("", tokens, 0)])


@pytest.mark.parametrize(
    "change",
    [
        {"top_p": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"repetition_penalty": float("inf")},
        {"max_new_tokens": 0}, {"max_new_tokens": 10**11}, {"samples": 0}, {"samples": 10**11}, {"batch_size": 10**11},
    ],
)  # fmt: skip
def test_settings_are_checked(change):
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')}="):
        Settings(**change).check()
