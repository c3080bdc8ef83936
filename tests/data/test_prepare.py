"""Prepare: the rows are the documents, whatever the files, the workers and the accidents."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from made_text import make_documents, options, write_texts

from deconstruct.data import tokenizer as tokenizers
from deconstruct.data.manifest import load_manifest
from deconstruct.data.pipeline import Windows, tokens_at
from deconstruct.data.prepare import PrepareOptions, add_arguments, prepare, run
from deconstruct.types import UserError

MAIN = """
import argparse, sys
from deconstruct.data.prepare import add_arguments, run
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    status = run(parser.parse_args())
    assert "jax" not in sys.modules, "prepare has imported jax"
    sys.exit(status)
"""


def stream(folder, split):
    """All tokens in rows of a split."""
    windows = Windows(folder, split, load_manifest(folder).row_length)
    rows = windows.read(range(len(windows)))
    assert (rows[1:, 0] == rows[:-1, -1]).all()  # neighbours share one token
    return np.concatenate([rows[:, :-1].ravel(), rows[-1, -1:]])


def start(tmp_path, *arguments):
    program = tmp_path / "main.py"
    program.write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_the_rows_are_the_documents(prepared, documents):
    manifest = load_manifest(prepared)
    tokenizer = tokenizers.load(prepared / "tokenizer")
    end = tokenizer.end_of_text
    assert manifest.train.documents + manifest.validation.documents == len(documents)
    assert manifest.train.documents > manifest.validation.documents >= 1
    assert manifest.tokenizer["sha256"] == tokenizer.fingerprint
    found = []
    for name in ("train", "validation"):
        split = manifest.split(name)
        tokens = stream(prepared, name)
        assert len(tokens) == split.rows * 48 + 1 <= split.tokens < len(tokens) + 48
        begun = [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)]
        texts = [text.removesuffix(tokenizer.decode([end])) for text in begun]
        own = [document for document in documents if document in texts]
        assert texts[:-1] == own[: len(texts) - 1]  # in order, and whole but for what the last row cuts
        assert split.documents - len(own) <= 2
        found += own
    assert len(set(found)) == len(found)
    assert (tokens_at(prepared, 49) == stream(prepared, "train")[:49]).all()
    assert not (prepared / ".partial").exists()


def test_unigram_perplexity(prepared):
    manifest = load_manifest(prepared)
    counts = np.bincount(stream(prepared, "train")[1:], minlength=300) + 1.0
    probability = (counts / counts.sum())[stream(prepared, "validation")[1:]]
    assert manifest.unigram_perplexity == pytest.approx(np.exp(-np.log(probability).mean()), rel=1e-12)


def test_files_of_another_kind_give_the_same_rows(tmp_path, prepared, documents):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    assert prepare(options(tmp_path / "out", path))["fingerprint"] == load_manifest(prepared).fingerprint


@pytest.mark.proof
def test_workers_and_a_kill_change_nothing(tmp_path):
    # Several units: .jsonl files are one each.
    text = tmp_path / "text"
    text.mkdir()
    for number in range(24):
        lines = [json.dumps({"text": document}) for document in make_documents(60, 1000, seed=number)]
        (text / f"{number}.jsonl").write_text("\n".join(lines))
    small = ["--vocab-size=300", "--row-length=48", "--validation-fraction=0.1"]
    one = prepare(options(tmp_path / "one", text))
    killed = tmp_path / "killed"
    process = start(tmp_path, f"--input={text}", f"--output={killed}", "--workers=2", *small)
    deadline = time.monotonic() + 60
    while len(list(killed.glob(".partial/*/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # ends only when the workers, which hold the pipes, have ended as well
    assert not (killed / "manifest.json").exists()
    with pytest.raises(UserError, match="prepare has not finished here; run: deconstruct prepare --output="):
        load_manifest(killed)
    process = start(tmp_path, f"--input={text}", f"--output={killed}", "--workers=2", *small)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "of 24 parts are there from an earlier run" in err
    assert "train: " in out
    assert (killed / "manifest.json").read_text() == (tmp_path / "one" / "manifest.json").read_text()
    assert json.loads((killed / "manifest.json").read_text()) == json.loads(json.dumps(one))


def test_again_on_a_complete_folder(tmp_path, prepared, texts, capsys):
    before = (prepared / "manifest.json").stat().st_mtime_ns
    prepare(options(prepared, texts))
    assert "is complete already" in capsys.readouterr().err
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    tokenizer = prepared / "tokenizer" / "tokenizer.model"
    other_texts = write_texts(tmp_path / "other", make_documents(5))
    for changed, message in [
        (options(prepared, texts, row_length=64), "--row-length=64: was 48 there; .* give another --output"),
        (options(prepared, texts, vocab_size=320), "--vocab-size=320: was 300 there"),
        (options(prepared, texts, seed=3), "--seed=3: was 0 there"),
        (options(prepared, texts, tokenizer=str(tokenizer)), "--tokenizer=.*: was None there"),
        (options(prepared, other_texts), "--input: not the text that was prepared there"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(changed)


def test_a_tokenizer_that_is_there(tmp_path, prepared, texts):
    again = prepare(options(tmp_path / "out", texts, tokenizer=str(prepared / "tokenizer" / "tokenizer.model")))
    assert again["fingerprint"] == load_manifest(prepared).fingerprint


def test_one_document_is_split_at_its_end(tmp_path, capsys):
    text = "\n".join(make_documents(20))
    (tmp_path / "one.txt").write_bytes(text.encode())
    manifest = prepare(options(tmp_path / "out", tmp_path / "one.txt"))
    assert "the input is one document: its end is the validation split" in capsys.readouterr().err
    assert manifest["one_document"] and manifest["train"]["documents"] == manifest["validation"]["documents"] == 1
    sizes = [manifest[name]["characters"] for name in ("train", "validation")]
    assert sum(sizes) == len(text) and 0.08 < sizes[1] / len(text) < 0.11
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer")
    held_out = tokenizer.decode(list(stream(tmp_path / "out", "validation")))
    assert text[sizes[0] :].startswith(held_out)


def test_two_documents_give_one_to_each_split(tmp_path):
    write_texts(tmp_path / "two", make_documents(2))
    manifest = prepare(options(tmp_path / "out", tmp_path / "two", validation_fraction=1e-6))
    assert manifest["train"]["documents"] == manifest["validation"]["documents"] == 1


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, texts, documents):
    import tokenizers as library

    vocabulary = {"<|endoftext|>": 0, "?": 1} | {str(i): i for i in range(2, 70_000)}
    made = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "large.json"))
    write_texts(tmp_path / "texts", [" ".join(map(str, range(s, s + 1000))) for s in range(60_000, 69_000, 1000)])
    manifest = prepare(options(tmp_path / "out", tmp_path / "texts", tokenizer=str(tmp_path / "large.json")))
    assert manifest["dtype"] == "uint32"
    assert stream(tmp_path / "out", "train").max() > 65_536


def test_bad_lines_are_counted_reported_and_limited(tmp_path, documents, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents) + "{broken\n")
    message = r"--max-bad-share=0.001: 1 of 41 lines \(2.44%\) are bad, the first .*x.jsonl:41: not JSON; .*=0.0244"
    with pytest.raises(UserError, match=message):
        prepare(options(tmp_path / "out", path))
    assert f"{path}:41: not JSON" in capsys.readouterr().err
    manifest = prepare(options(tmp_path / "out", path, max_bad_share=0.0244))  # as the message says
    assert manifest["bad_lines"] == {"count": 1, "examples": [f"{path}:41: not JSON"]}
    assert "1 parts are there from an earlier run" in capsys.readouterr().err
    path.write_text("{broken\n")
    with pytest.raises(UserError, match=r"--input: no document in it|--input: the text is empty"):
        prepare(options(tmp_path / "none", path))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"vocab_size": 100}, "--vocab-size=100: must be at least 259"),
        ({"vocab_size": 10**20}, "--vocab-size=100000000000000000000: must be at most 16777216"),
        ({"row_length": 0}, "--row-length=0: must be at least 1"),
        ({"validation_fraction": 1.0}, "--validation-fraction=1.0: must be between 0 and 1"),
        ({"max_bad_share": 2.0}, "--max-bad-share=2.0: must be from 0 to 1"),
        ({"workers": -1}, "--workers=-1: must be at least 1"),
        ({"max_characters": 0}, "--max-characters=0: must be at least 1"),
        ({"tokenizer": "gone.model"}, "gone.model: no such tokenizer file"),
        ({"vocab_size": 100_000}, "--vocab-size=100000: the text gives only"),
        ({"row_length": 10_000}, "the validation split has .* tokens and a row takes 10001; give more text, a smaller"),
        ({"row_length": 10**6}, "the train split has .* tokens and a row takes 1000001; give more text or a smaller"),
    ],
)
def test_wrong_options(tmp_path, texts, others, message):
    with pytest.raises(UserError, match=message):
        prepare(options(tmp_path / "out", texts, **others))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_output_that_is_a_file_or_taken(tmp_path, texts):
    import fcntl

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output=.*file: is a file; give a folder"):
        prepare(options(tmp_path / "file", texts))
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare is writing here"):
            prepare(options(tmp_path / "out", texts))


def test_the_command_line_without_an_input(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([f"--output={tmp_path}", "--workers=1", "--row-length=32", "--max-characters=400000",
                              "--vocab-size=512"])  # fmt: skip
    assert run(args) == 0
    manifest = load_manifest(tmp_path)
    assert manifest.train.characters + manifest.validation.characters == 400_000
    assert f"train: {manifest.train.documents:,} documents" in capsys.readouterr().out
    defaults = PrepareOptions(output="x")
    # Not given is another thing than the default: with --tokenizer it is refused.
    assert vars(parser.parse_args(["--output=x"])) == {**vars(defaults), "input": [], "vocab_size": None}
