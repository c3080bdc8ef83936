"""Documents made for recall say what their kind says, and come out of prepare one a row."""

import numpy as np
import pytest

from deconstruct.data import tokenizer
from deconstruct.data.manifest import load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.data.prepare import PrepareOptions, prepare
from deconstruct.data.recall import parse_recall
from deconstruct.types import UserError


@pytest.mark.parametrize("kind", ["mqar(pairs=5,queries=12,length=50)", "induction(pairs=5,length=20)"])
def test_what_followed_a_key_follows_it(kind):
    recall = parse_recall(kind)
    words = np.array(recall.words())
    assert len(set(words)) == len(words)
    tokens = recall.tokens(40)
    assert tokens.shape == (40, recall.length)
    for row, times in zip(words[tokens].tolist(), recall.answers(tokens).tolist(), strict=True):
        keys = [i for i, word in enumerate(row) if word[0] == "k"]
        assert times == [row[:i].count(word) if word[0] == "k" else 0 for i, word in enumerate(row)]
        first = {row[i]: row[i + 1] for i in reversed(keys[:-1])}
        if recall.kind == "mqar":
            assert [first[row[i]] for i in keys] == [row[i + 1] for i in keys]
            assert {word[0] for word in first.values()} == {"v"}
            assert (len(first), len(keys), sum(word[0] == "f" for word in row)) == (5, 17, 50 - 2 * 17)
            assert {row.count(key) for key in first} == {3, 4}  # 12 queries over 5 keys: two or three each
        else:
            said = [row[i] for i in keys]
            assert said[:6] == said[6:] and len(set(said)) == 6 and len(row) - len(keys) == 8
            assert keys[5] - keys[0] == keys[11] - keys[6] == 5  # fillers stand around them, not between
    assert np.array_equal(tokens, recall.tokens(40)) and not np.array_equal(tokens, recall.tokens(40, stream=1))


def test_prepare(tmp_path):
    made = "recall:mqar(pairs=3,queries=4,keys=9,values=9,length=15,documents=60)"
    options = PrepareOptions(input=(made,), output=str(tmp_path), row_length=16, validation_fraction=0.2, workers=1)
    manifest = prepare(options)
    assert prepare(options) == manifest  # complete already
    recall = parse_recall(made)
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 60
    assert tokenizer.load(tmp_path / "tokenizer").decode([0, 2, 11, 20]) == "<|endoftext|> k0 v0 f0"
    rows = [w[:-1] for split in ("train", "validation") for w in Windows(tmp_path, split, 16)]
    assert all(row[-1] == 0 for row in rows)  # a document and its end, in each row
    expected = {tuple(row) for row in recall.tokens(60).tolist()}
    assert {tuple(row[:-1].tolist()) for row in rows} <= expected and len(rows) >= 57
    assert load_manifest(tmp_path).tokenizer["vocab_size"] == 2 + 9 + 9 + 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("recall:mqra", "recall 'mqra' is unknown; did you mean mqar"),
        (
            "recall:mqar(pair=3)",
            r"pair is unknown; its options are pairs, keys, values, fillers, length",
        ),
        ("recall:mqar(pairs=x)", "pairs=x: expected a whole number"),
        ("recall:mqar(pairs=3", "a parenthesis is not closed"),
        ("recall:mqar(pairs=100)", "keys=64: must be at least 100"),
        ("recall:mqar(length=40)", "length=40: must be at least 48"),
        ("recall:induction(pairs=8,fillers=0)", "fillers=0: must be at least 1"),
    ],
)
def test_mistakes(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(input=(given,), output=str(tmp_path / "out"), row_length=64))


def test_it_stands_alone(tmp_path):
    for more in ({"input": ("recall:mqar", "recall:induction")}, {"input": ("recall:mqar",), "tokenizer": "a.json"}):
        with pytest.raises(UserError, match="--input=recall:mqar: has words of its own; give it alone"):
            prepare(PrepareOptions(output=str(tmp_path / "out"), row_length=64, **more))
