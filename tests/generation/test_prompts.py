"""Prompts from files: what is no prompt is named by file and line."""

from __future__ import annotations

import argparse

import pytest

from deconstruct.data import tokenizer
from deconstruct.generation.command import _prompts
from deconstruct.types import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizer.train_sentencepiece(["fog and sea and ship and lamp "] * 20, 270, folder)


def read(text, path=None, prompt=None):
    return list(_prompts(argparse.Namespace(prompt=prompt, prompts=path), text))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": 5}', r"a.jsonl:1: `prompt` is int, not text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": null}', r"a.jsonl:2: `prompt` is NoneType, not text"),
        ("a.jsonl", b'{"prompt": ""}', r"a.jsonl:1: the prompt is empty"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', r"a.jsonl:1: the prompt is not UTF-8 at character 0"),
        ("a.jsonl", b'{"text": "a"}', r"a.jsonl:1: expected an object with text in `prompt`"),
        ("a.jsonl", b"5", r"a.jsonl:1: expected an object"),
        ("a.jsonl", b"{", r"a.jsonl:1: not JSON"),
        ("a.jsonl", b"[" * 90_000, r"a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"tokens": []}', r"a.jsonl:1: `tokens` should be a list of ids"),
        ("a.jsonl", b'{"tokens": [1.5]}', r"a.jsonl:1: `tokens` should be a list of ids"),
        ("a.jsonl", b'{"tokens": [true]}', r"a.jsonl:1: `tokens` should be a list of ids"),
        ("a.txt", b"one\n\xfftwo", r"--prompts=.*a.txt: line 2 is not UTF-8 \(byte 4\)"),
        ("a.txt", "Grüße".encode("utf-16"), r"a.txt: line 1 is not UTF-8 \(byte 0\)"),
        ("a.txt", b"", r"a.txt: no prompt in it"),
        ("a.txt", b"one\n\ntwo", r"a.txt:2: the prompt is empty"),
    ],
)
def test_what_is_no_prompt(tmp_path, text, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(text, tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_prompt_of_bytes_that_are_no_text(text):
    with pytest.raises(UserError, match="--prompt: the prompt is not UTF-8 at character 3"):
        read(text, prompt=b"fog\xff".decode(errors="surrogateescape"))


def test_what_is(tmp_path, text):
    (tmp_path / "a.txt").write_bytes("\ufefffog\r\nse\u2028a\n".encode())
    assert [prompt for prompt, _ in read(text, tmp_path / "a.txt")] == ["fog", "se\u2028a"]
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "se\u2028a"}\n{"tokens": [5, 6]}\n'.encode())
    assert [ids for _, ids in read(text, tmp_path / "a.jsonl")] == [text.encode("se\u2028a"), [5, 6]]
