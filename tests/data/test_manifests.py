"""Manifests and shards that are not as prepare wrote them: one line that says what is wrong, at every reader."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from made_text import make_documents, options, write_texts

from deconstruct.data import pipeline, tokenizer
from deconstruct.data.manifest import check_shards, load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.data.prepare import prepare
from deconstruct.types import UserError


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "prepared")


def refused(copy, call=load_manifest):
    with pytest.raises(UserError) as error:
        call(copy)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"), ("null", "it is NoneType, not an object"), ("[]", "it is list, not an object"),
        ("{", "it is not JSON"), ("{}", "it has no row_length"), ("\udcff", "it is not JSON"),
        ("[" * 90_000, "it is not JSON"),
    ],
)  # fmt: skip
def test_files_that_are_no_manifest(copy, text, message):
    (copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    said = refused(copy)
    assert said.startswith(f"{copy}/manifest.json: not a manifest of prepare (") and message in said


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), 2, "format 2, this version reads 1"),
        (("row_length",), "48", "row_length is str"),
        (("row_length",), True, "row_length is bool"),
        (("row_length",), 0, "row_length=0"),
        (("dtype",), "float32", "dtype='float32'"),
        (("tokenizer",), None, "tokenizer is NoneType"),
        (("tokenizer", "sha256"), None, "it has no tokenizer.sha256"),
        (("tokenizer", "file"), "../tokenizer.model", "is not a tokenizer of this folder"),
        (("train", "shards"), [], "train.rows="),
        (("train", "shards"), [3], "train.shards is int, not an object"),
        (("train", "rows"), 7, "train.rows=7 is not the sum over its shards"),
        (("train", "shards", 0, "name"), "../x", "'../x' is not the name of a shard in this folder"),
        (("train", "shards", 0, "name"), "/etc/passwd", "'/etc/passwd' is not the name of a shard"),
        (("train", "shards", 0, "sha256"), "0" * 64, "its fingerprint is not that of its shards and tokenizer"),
        (("surplus",), 1, "surplus is not a key of it"),
    ],
)
def test_manifests_with_a_wrong_entry(copy, keys, value, message):
    raw = json.loads((copy / "manifest.json").read_text())
    entry = raw
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    if message.startswith("it has no"):
        del entry[keys[-1]]
    (copy / "manifest.json").write_text(json.dumps(raw))
    assert message in refused(copy)


def test_the_manifest_names_the_tokenizer(copy, tmp_path):
    """A file of the other kind beside it is not read, and another in its place is noticed."""
    manifest = load_manifest(copy)
    (copy / "tokenizer" / "tokenizer.json").write_text("not read")
    assert tokenizer.of_prepared(copy, manifest).fingerprint == manifest.tokenizer["sha256"]
    other = tokenizer.train_sentencepiece(["other words altogether, and more of them"] * 9, 280, tmp_path / "other")
    other.save(copy / "tokenizer")
    said = refused(copy, lambda folder: tokenizer.of_prepared(folder, manifest))
    assert f"tokenizer.model: not the tokenizer of {copy}/manifest.json (its sha256 is {other.fingerprint[:12]}" in said


def rewrite(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for row in rows:
        writer.write(row.tobytes())
    writer.close()


def rows_of(folder):
    windows = Windows(folder, "train", 48)
    return windows.read(range(len(windows))).astype(np.uint16)


def test_another_shard_of_the_same_size(copy):
    rows = rows_of(copy)
    shard = copy / load_manifest(copy).train.shards[0].name
    size = shard.stat().st_size
    rows[3, 5] += 1
    rewrite(shard, rows)
    assert shard.stat().st_size == size
    assert "damaged or changed, its sha256 is not the one" in refused(copy, lambda f: Windows(f, "train", 48))
    with pytest.raises(UserError, match="damaged or changed"):
        prepare(options(copy, *load_manifest(copy).options["input"]))


def test_a_shard_that_changes_while_it_is_in_use(copy, monkeypatch):
    monkeypatch.setattr(pipeline, "LOOK_SECONDS", 0.0)
    windows = Windows(copy, "train", 48)
    shard = copy / load_manifest(copy).train.shards[0].name
    rows, before = windows.read(range(len(windows))), shard.read_bytes()
    os.utime(shard)  # touched: the same content
    assert (windows.read([2])[0] == rows[2]).all()
    changed = rows.astype(np.uint16)
    changed[3, 5] += 1
    rewrite(shard, changed)
    with pytest.raises(UserError, match="damaged \\(changed while it was in use\\)"):
        windows.read([2])
    shard.write_bytes(before)
    assert (windows.read([2])[0] == rows[2]).all()
    shard.unlink()
    with pytest.raises(UserError, match="deleted while it was in use"):
        windows.read([2])


def test_token_ids_beyond_the_vocabulary(copy, monkeypatch):
    rows = rows_of(copy)
    windows = Windows(copy, "train", 48)
    shard = copy / load_manifest(copy).train.shards[0].name
    rows[3, 5] = 300
    rewrite(shard, rows)
    monkeypatch.setattr(windows._rows, "_check_unchanged", lambda _: None)  # as of data of more than 256 MiB
    with pytest.raises(UserError, match=r"row 3 holds token id 300, and its tokenizer has the ids 0 to 299"):
        windows.read(range(5))


def test_large_data_are_checked_by_size(copy):
    shard = load_manifest(copy).train.shards[0]
    data = bytearray((copy / shard.name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / shard.name).write_bytes(data)
    assert len(check_shards(copy, load_manifest(copy).train, hashed=1000)) == 1
    with pytest.raises(UserError, match="damaged or changed"):
        check_shards(copy, load_manifest(copy).train)


def test_texts_that_are_all_the_same(tmp_path):
    write_texts(tmp_path / "texts", [make_documents(1)[0]] * 20)
    with pytest.raises(UserError, match=r"--input: its 20 documents are all the same text, .*give at least two"):
        prepare(options(tmp_path / "out", tmp_path / "texts"))


def test_texts_that_are_none(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    (tmp_path / "b.txt").write_bytes("Grüße".encode("utf-16"))
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_bytes(b"")
    for name, message in {
        "a.txt": r"--input: no document in it \(1 bad, the first .*a.txt:2: not UTF-8\)",
        "b.txt": r"no document in it \(1 bad, the first .*b.txt:1: not UTF-8\)",
        "c.parquet": r"c.parquet: column 'text' holds int64, not text; --key should be one of body",
        "d.parquet": r"d.parquet: column 'text' holds double, not text; no column of it holds text",
        "e.txt": r"--input: no document in it \(the text is empty\)",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            prepare(options(tmp_path / "out", tmp_path / name))
        assert "\n" not in str(error.value)
