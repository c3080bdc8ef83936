"""What prepare finds in its output: somebody else's files stay, and only what it has named itself is deleted."""

from __future__ import annotations

import json
import os

import pytest
from made_text import options

from deconstruct.data.manifest import load_manifest
from deconstruct.data.output import Output
from deconstruct.data.prepare import prepare
from deconstruct.types import UserError


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "old-00000-of-00001.array_record", "train-00000-of-00001.array_record", ".partial/thesis.tex",
        "tokenizer/tokenizer.model", "tokenizer/tokenizer.json", ".partial/record.json",
    ],
)  # fmt: skip
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path, texts, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = everything(tmp_path / "out")
    with pytest.raises(UserError, match=r"--output=.*: holds |record.json: not a record of prepare") as refused:
        prepare(options(tmp_path / "out", texts))
    assert name.split("/")[0] in str(refused.value) and "\n" not in str(refused.value)
    assert everything(tmp_path / "out") == before


def test_what_is_put_beside_a_run_that_was_killed_stays(tmp_path, texts, prepared):
    """The run is ended between its last shard and its manifest; another with fewer rows follows."""
    out = tmp_path / "out"
    prepare(options(out, texts))
    names = [path.name for path in out.glob("*.array_record")]
    (out / "manifest.json").unlink()
    output = Output(str(out))
    partial = output.begin("0123456789abcdef")
    output.claim([*names, "left-00000-of-00001.array_record", "tokenizer/tokenizer.model"])
    (out / "left-00000-of-00001.array_record").write_text("of the run that was killed")
    for name in ("00000.tokens", "00000.tokens.unfinished-host-12", "00000.json"):
        (partial / name).write_text("{}")
    (partial / "mine.txt").write_text("mine")
    (out / ".partial" / "mine.txt").write_text("mine")
    prepare(options(out, texts))
    assert load_manifest(out).fingerprint == load_manifest(prepared).fingerprint
    assert not (out / "left-00000-of-00001.array_record").exists()
    left = sorted(str(path) for path in everything(out / ".partial"))
    assert left == ["0123456789abcdef/mine.txt", "mine.txt"]
    # A second kind of tokenizer that comes to lie beside the one of a run that has not finished is nobody's either.
    (out / "manifest.json").unlink()
    output.begin("0123456789abcdef")
    output.claim([*names, "tokenizer/tokenizer.model"])
    prepare(options(tmp_path / "again", texts))
    os.replace(tmp_path / "again" / "tokenizer" / "tokenizer.model", out / "tokenizer" / "tokenizer.model")
    (out / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds tokenizer/tokenizer.json, which prepare has not put there"):
        prepare(options(out, texts))


def test_a_record_names_nothing_outside(tmp_path, texts):
    precious = tmp_path / "precious"
    precious.write_text("")
    output = Output(str(tmp_path / "out"))
    output.begin("0123456789abcdef")
    record = {"made_by": "deconstruct prepare", "runs": ["..", "0123456789abcdef"], "files": ["../precious", "/etc/x"]}
    (tmp_path / "out" / ".partial" / "record.json").write_text(json.dumps(record))
    prepare(options(tmp_path / "out", texts))
    assert precious.exists()


def test_a_finished_folder_may_hold_notes(tmp_path, texts, capsys):
    prepare(options(tmp_path / "out", texts))
    (tmp_path / "out" / "README.md").write_text("mine")
    prepare(options(tmp_path / "out", texts))
    assert "is complete already" in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").exists()


def test_an_output_that_cannot_be_made(tmp_path, texts):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be made: Not a directory"):
        prepare(options(tmp_path / "file" / "out", texts))
