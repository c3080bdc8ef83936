"""Tokenizers: nothing is lost, nothing in a text becomes special, the same text gives the same file."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers

from deconstruct.data.tokenizer import SMALLEST_VOCABULARY, load, train_sentencepiece
from deconstruct.types import UserError

AWKWARD = [
    "", " ", "  lead and trail  ", "\n", "\t\ta\tb", "a\r\nb\r\n\r\n", "    indented\n        more", "\u2581",
    "a \u2581\u2581 b", "</s>", "<s><unk></s><0x0A><pad>", "\0a\0", "😀👩‍👩‍👧", "e\u0301 \u00e9",
    "\ufeff\u200b\u2028\u00a0", "\u2047\u2585",
    "漢字かな", "x" * 3000, " " * 3000, ("word " * 700) + "\n" + ("   gap" * 300),
]  # fmt: skip


@pytest.fixture(scope="module", params=[SMALLEST_VOCABULARY, 261, 300, 420])
def trained(request, tmp_path_factory, documents):
    return train_sentencepiece(documents, request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def json_file(tmp_path_factory, documents):
    """A byte-level BPE of the `tokenizers` library, like those of Pythia and Qwen."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents, trainer)
    made.enable_truncation(4)
    path = tmp_path_factory.mktemp("json") / "bpe.json"
    made.save(str(path))
    return path


def random_texts(count: int) -> list[str]:
    draw = random.Random(7)
    common = "ab  \n\t\r\u2581é😀\0<>/s\u2047\u2585\ufeff01.,"

    def character() -> str:
        if draw.random() < 0.8:
            return draw.choice(common)
        return chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))

    return ["".join(character() for _ in range(draw.randrange(80))) for _ in range(count)]


def test_any_text_comes_back_and_none_becomes_special(trained, documents):
    for text in [*AWKWARD, *random_texts(1500), *documents]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.end_of_text not in ids
        assert all(0 <= i < trained.vocab_size for i in ids)


def test_long_texts_are_cut_without_changing_their_ids(trained, documents):
    text = " ".join(documents) + "  " + "\n".join(documents)
    assert trained._may_cut
    assert trained.encode(text) == trained._processor.encode(text)


def test_pieces_are_learned(trained, documents):
    if trained.vocab_size == 420:
        assert len(trained.encode(documents[0])) < 0.6 * len(documents[0])


def test_save_and_load(trained, tmp_path, documents):
    path = trained.save(tmp_path / "new")
    for place in (path, tmp_path / "new"):
        again = load(place)
        assert (again.fingerprint, again.vocab_size, again.end_of_text) == (
            trained.fingerprint, trained.vocab_size, trained.end_of_text,
        )  # fmt: skip
        assert again.encode(documents[0]) == trained.encode(documents[0])


def test_training_is_deterministic_and_the_sample_spans_documents(tmp_path, documents):
    first = train_sentencepiece(documents, 300, tmp_path / "a")
    again = train_sentencepiece(iter(documents), 300, tmp_path / "b")
    turned = train_sentencepiece(documents[::-1], 300, tmp_path / "c", sample_characters=10_000)
    same_sample = train_sentencepiece(documents, 300, tmp_path / "d", sample_characters=10_000)
    assert first.fingerprint == again.fingerprint
    assert turned.fingerprint == same_sample.fingerprint != first.fingerprint


def test_a_json_tokenizer(json_file, tmp_path):
    tokenizer = load(json_file)
    assert (tokenizer.kind, tokenizer.end_of_text, tokenizer.vocab_size) == ("tokenizers", 0, 320)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    assert 0 not in tokenizer.encode("a<|endoftext|>b")  # the words, not the separator
    tokenizer.save(tmp_path)
    assert load(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        ("abc", 258, "--vocab-size=258: must be at least 259"),
        ("ab ab ab ac", 4096, r"--vocab-size=4096: the text gives only (\d+) pieces; use --vocab-size=\1"),
        ("", 300, "--input: the text is empty"),
    ],
)
def test_wrong_vocabularies(tmp_path, text, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece([text], vocab_size, tmp_path)


@pytest.mark.parametrize("text", ["ab ab ab ac", "Some text, of no great length; with a few words in it, some twice."])
def test_the_vocabulary_that_would_do_does(tmp_path, text):
    with pytest.raises(UserError) as caught:
        train_sentencepiece([text], 4096, tmp_path)
    size = int(str(caught.value).split("--vocab-size=")[-1].split()[0])
    assert train_sentencepiece([text], size, tmp_path).vocab_size == size


def test_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.txt").write_text("")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "bare.json").write_text(json.dumps(json.loads(bare.to_str())))
    for name, message in {
        "x.model": "not a SentencePiece model", "x.json": "not a file of the tokenizers library",
        "x.txt": "should end in .model or .json", "bare.json": "has no end-of-text token", "gone.model": "no such",
        ".": "no tokenizer in this folder",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)
