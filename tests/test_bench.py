"""Benches run, at a size where their figures mean nothing."""

import json

import pytest

from deconstruct import cli
from deconstruct.attention.variants import one_of_each
from deconstruct.bench.contexts import context_speed, contexts_as_text
from deconstruct.bench.generation import NEW, Ours, generation_speed
from deconstruct.bench.rounds import Case, ratio, speeds_as_text
from deconstruct.bench.train_step import train_speed
from deconstruct.model.language_model import build_model

TINY = Case("tiny", 2, 8, 64, 16, 24, 1, 2)


def test_train_step():
    found = train_speed(TINY, "mlp", peers=False, rounds=2, steps=1)
    assert found["tokens_per_second"]["deconstruct"] > 0 and "ratio" not in found
    assert speeds_as_text(found).startswith("tiny (batch 2 x 8, d 16, 1 layers, vocabulary 64): deconstruct ")


def test_generation():
    ours = Ours(build_model(TINY.config("non_approximate").model), TINY.tokens(4))
    assert ours() > 0 and ours.tokens.shape == (2, NEW)
    found = generation_speed(TINY, 1, "mlp", peers=False, rounds=1)
    assert found["case"]["batch"] == 1 and found["tokens_per_second"]["deconstruct"] > 0


@pytest.mark.proof
def test_contexts():
    found = context_speed(TINY, rounds=1, contexts=(16,))
    assert list(found["variants"]) == one_of_each() and json.loads(json.dumps(found)) == found
    standard = found["variants"]["standard"]
    assert standard["ratio"][0]["median"] == 1 and standard["cache_bytes"] == standard["paper_cache_bytes"] == [1024]
    assert found["variants"]["mlp"]["cache_bytes"] == [0] and found["variants"]["approximate"]["milliseconds"][0] > 0
    assert contexts_as_text(found).count("\nstandard ") == 2


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 6.0, 20.0], [1.0, 2.0, 4.0]) == {"median": 3.0, "least": 2.0, "most": 5.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "--variant=mlp"], "--variant=mlp: only standard has a peer"),
        (["contexts", "--peers"], "--peers: contexts compares all variants"),
        (["contexts", "--variant=mlp"], "--variant: contexts compares all variants"),
        (["generate", "--steps=2"], "--steps=2: only train has steps"),
        (["--rounds=0"], "--rounds=0: must be at least 1"),
        (["generate", "--variant=nonsense"], "variant 'nonsense' is unknown"),
    ],
)
def test_mistakes(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
