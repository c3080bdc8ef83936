"""A workdir that is damaged, read-only, or none: every verb says so in one line that names it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deconstruct.cli import main
from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.workdir import Workdir
from deconstruct.train.loop import train
from deconstruct.types import UserError
from tests.tiny import quick

ROOT = Path(__file__).parents[2]


def readers(run, folder):
    """What reads the latest checkpoint of a run."""
    return (
        ["evaluate", f"--workdir={run}"],
        ["generate", f"--workdir={run}", "--prompt=fog"],
        ["export", f"--workdir={run}", f"--output={folder / 'export'}"],
        ["draw", "maps", f"--workdir={run}", "--text=fog", f"--output={folder / 'maps.png'}"],
    )


def flip(folder):
    """A bit in the largest file of arrays."""
    path = max((folder / "model" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def other_step(folder):
    meta = json.loads((folder / "meta" / "data.json").read_text())
    (folder / "meta" / "data.json").write_text(json.dumps({**meta, "step": 5}))


def replaced(text):
    return lambda folder: (folder / "meta" / "data.json").write_text(text)


DAMAGES = [flip, other_step, replaced("{}")]
MORE = [replaced(text) for text in ("null", "", "[]", '{"step": 5}')]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax, which the program leaves out
@pytest.mark.parametrize("damage", quick([*DAMAGES, *MORE], DAMAGES))
def test_a_damaged_checkpoint_is_named_with_the_one_before(run, tmp_path, capsys, damage):
    damage(run / "checkpoints" / "6")
    for words in readers(run, tmp_path):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{run}/checkpoints/6 is damaged: " in said and said.endswith("; the one before is step 4\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "export").exists()


@pytest.mark.proof
def test_reads_that_fail_late_add_nothing(run, tmp_path):
    """The reads of all arrays are under way when the first fails."""
    for path in (run / "checkpoints" / "6" / "model").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    command = [sys.executable, "-m", "deconstruct", "export", f"--workdir={run}", f"--output={tmp_path / 'export'}"]
    for _ in range(4):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_workdir_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    config = Workdir(run).read_config()
    with pytest.raises(UserError, match=r"--workdir=.*file: is a file; give a folder"):
        train(config, tmp_path / "file")
    with pytest.raises(UserError, match=r"--workdir=.*file/run: cannot be made: Not a directory; give another"):
        Workdir(tmp_path / "file" / "run").make()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def read_only(run, tmp_path):
    """The run, where nothing can be written."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a folder that even root cannot write to takes root and mount")
    folder = tmp_path / "read-only"
    folder.mkdir()
    for words in (["--bind", str(run.parent), str(folder)], ["-o", "remount,ro,bind", str(folder)]):
        mounted = subprocess.run(["mount", *words], capture_output=True, text=True)
        if mounted.returncode:
            subprocess.run(["umount", str(folder)], capture_output=True)
            pytest.skip(f"a folder cannot be mounted here: {mounted.stderr.strip()}")
    yield folder / "run"
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.proof
def test_what_cannot_be_written_is_one_line(read_only, tmp_path, capsys):
    folder = read_only.parent
    assert main(["generate", f"--workdir={read_only}", "--prompt=fog"]) == 0  # reading needs no more
    assert main(["status", str(read_only)]) == 0
    capsys.readouterr()
    for words, message in (
        (["evaluate", f"--workdir={read_only}"], f"{read_only}/eval.jsonl: Read-only file system"),
        (["export", f"--workdir={read_only}", f"--output={folder / 'export'}"], "Read-only file system"),
        (
            ["generate", f"--workdir={read_only}", "--prompt=fog", f"--output={folder / 'a.jsonl'}"],
            f"{folder / 'a.jsonl'}: Read-only file system",
        ),
        (
            ["generate", f"--workdir={read_only}", "--prompt=fog", f"--output={folder / 'gone' / 'a.jsonl'}"],
            f"a.jsonl: there is no folder {folder / 'gone'}; make it, or give another",
        ),
        (["prepare", f"--output={folder / 'prepared'}"], "cannot be made: Read-only file system; give another"),
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err.splitlines()
        assert message in said[-1] and said[-1].startswith(f"deconstruct {words[0]}: "), said
    config = Workdir(read_only).read_config()
    with pytest.raises(UserError, match=r"--workdir=.*/run: cannot be written to \(Read-only file system\)"):
        train(config.replace(steps=8), read_only)
    with pytest.raises(UserError, match=r"--workdir=.*/new: cannot be made: Read-only file system; give another"):
        train(config, folder / "new")
    assert finished_steps(read_only / "checkpoints") == [2, 4, 6]
