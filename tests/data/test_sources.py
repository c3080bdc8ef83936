"""Reading documents: every kind of file gives the same ones, and what is not a document is named by file and line."""

from __future__ import annotations

import gzip
import importlib.util
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from deconstruct.data.sources import BadLine, capped, identity, work_units
from deconstruct.data.sources import documents as read_unit
from deconstruct.types import UserError


def read(*inputs, key="text"):
    return [item for unit in work_units(map(str, inputs), key) for item in read_unit(unit)]


def json_lines(texts, key="text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def test_every_kind_gives_the_same_documents(tmp_path, texts, documents):
    lines = json_lines(documents, "body")
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # two frames, as tools that compress in parallel write them
    zipped = zstandard.compress(lines[:5000]) + zstandard.compress(lines[5000:])
    (tmp_path / "c.jsonl.zst").write_bytes(zipped)
    pq.write_table(pa.table({"id": range(len(documents)), "body": documents}), tmp_path / "d.parquet", row_group_size=7)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert read(tmp_path / name, key="body") == documents
    assert read(texts) == documents == read(f"{texts}/*.txt") == read(*sorted(texts.iterdir()))
    assert read(tmp_path, key="body") == documents * 4


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [
        b'{"text": "good"}', b"{", b'{"other": 1}', b'{"text": 3}', b'"text"', b"\xff\xfe", b"", b'{"text": "\\ud800"}',
        b'{"text": ""}', b'{"text": "end"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert [item for item in found if isinstance(item, str)] == ["good", "end"]
    bad = [item for item in found if isinstance(item, BadLine)]
    assert [(item.path, item.line) for item in bad] == [(str(path), n) for n in (2, 3, 4, 5, 6, 8)]
    assert [item.reason for item in bad] == [
        "not JSON", "no key 'text' (it has 'other')", "the value of 'text' is int, not a string", "not a JSON object",
        "not UTF-8", "the value of 'text' holds half of a surrogate pair, which is not text",
    ]  # fmt: skip
    assert str(bad[0]) == f"{path}:2: not JSON"


def test_other_bad_documents(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\n\xff")
    assert read(tmp_path / "x.txt") == [BadLine(str(tmp_path / "x.txt"), 3, "not UTF-8")]
    (tmp_path / "y.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    assert read(tmp_path / "y.txt") == ["marked\r\n"]
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "z.parquet")
    null = BadLine(str(tmp_path / "z.parquet"), 2, "column 'text' is NoneType, not a string")
    assert read(tmp_path / "z.parquet") == ["a", null]


def test_inputs_that_cannot_be_read(tmp_path, documents):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_bytes(b"")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"nothing")
    lines = json_lines(documents)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(lines)[:-20])
    (tmp_path / "not.jsonl.zst").write_bytes(b"plain text")
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    for name, message in {
        "gone": "--input=.*gone: no such file or folder; give a file", "empty": "no text in this folder; .*.jsonl.zst",
        "x.pdf": "unknown kind of file; its name should end in one of .txt", "*.csv": "no file matches",
        "x.parquet": "no column 'text'; --key should be one of body", "y.parquet": "not a whole parquet file",
        "cut.jsonl.gz": "damaged or cut short", "cut.jsonl.zst": "damaged or cut short",
        "not.jsonl.zst": "damaged or cut short", "not.jsonl.gz": "damaged or cut short",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    with pytest.raises(UserError, match="--input=hub:: should be hub:NAME"):
        work_units(["hub:"])


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="needs an environment without `datasets`")
def test_the_hub_without_its_extra():
    with pytest.raises(UserError, match=r"hub:some/name: needs the extra hub: pip install 'deconstruct\[hub\]'"):
        read("hub:some/name")


def test_the_standard_library_is_the_default():
    units = work_units([])
    names = [path for unit in units for path in unit.paths]
    assert len(names) > 300 and any(name.endswith("argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert units == work_units([]) and identity(units) == identity(work_units([]))
    assert all(isinstance(item, str) for item in read_unit(units[0]))


def test_a_cap_takes_the_first_characters(texts, documents, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines(documents))
    whole = "".join(documents)
    for size in (1, 700, 5000, len(whole), len(whole) + 5):
        for place in (texts, tmp_path):
            units = capped(work_units([str(place)]), size)
            assert "".join(item for unit in units for item in read_unit(unit)) == whole[:size]
    both = capped(work_units([str(texts), str(tmp_path)]), len(whole) + 10)
    assert "".join(item for unit in both for item in read_unit(unit)) == whole + whole[:10]
