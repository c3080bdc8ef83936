"""The verb `status`: what it says of runs in every state, what is damaged in them, and where their time went."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deconstruct.cli import main
from deconstruct.lock import RECORD, SILENT, alone_in
from deconstruct.run import goodput
from deconstruct.run.status import status
from deconstruct.run.workdir import Workdir, find_workdirs, named
from deconstruct.types import UserError

ROOT = Path(__file__).parents[2]
NOW = time.time()
CONFIG = {"steps": 100, "batch_size": 4, "sequence_length": 10}
SECONDS = {"compile": 5.0, "step": 40.0, "data": 2.0, "checkpoint": 3.0}
START = {"event": "start", "time": NOW - 100, "host": "here", "pid": 12, "processes": 1, "devices": 1, "device": "cpu"}
BEGIN = {"event": "begin", "time": NOW - 90, "step": 0, "lost_steps": 0}
SAVE = {"event": "save", "time": NOW - 45, "step": 50, "seconds": SECONDS}
KILLED = {"event": "end", "time": NOW - 35, "status": "killed"}
STOPPED = {"event": "end", "time": NOW - 40, "status": 75, "step": 50, "seconds": SECONDS | {"checkpoint": 4.0}}


def made(folder, *, config=CONFIG, steps=range(10, 61, 10), saved=(50,), events=(START, BEGIN, SAVE)):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    lines = [
        {"step": step, "loss": 3 - step / 100, "tokens_per_second": 40.0, "seconds": {"step": 8.0, "data": 1.0}}
        for step in steps
    ]
    for name, records in (("metrics", lines), ("sessions", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in saved:
        (folder / "checkpoints" / str(step) / "meta").mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "meta" / "data.json").write_text("{}")
    return folder


def record_of(folder, **changes):
    with alone_in(folder, "--workdir", "train"):
        record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


def look(folder):
    return status(Workdir(folder), folder.name)


def test_a_run_that_is_alive(tmp_path):
    folder = made(tmp_path / "run")
    with alone_in(folder, "--workdir", "train"):
        seen = look(folder)
    assert (seen.state, seen.pid, seen.step, seen.steps, seen.checkpoint) == ("running", os.getpid(), 60, 100, 50)
    assert seen.loss == pytest.approx(2.4) and seen.tokens_per_second == 40
    assert seen.seconds_left == 40 * 4 * 10 / 40
    assert seen.checkpoint_age == pytest.approx(time.time() - SAVE["time"], abs=5)
    assert seen.goodput.wall == pytest.approx(time.time() - START["time"], abs=5)
    assert seen.goodput.seconds["steps"] == 40 + 8  # the save's, and the line logged since
    assert seen.goodput.lost_steps == 0 and not seen.damaged


@pytest.mark.parametrize(
    ("state", "events", "steps"),
    [
        ("stopped", (START, BEGIN, SAVE, STOPPED), 50),
        ("failed", (START, BEGIN, SAVE, {"event": "end", "time": NOW, "status": "failed", "error": "OSError: x"}), 60),
        ("dead", (START, BEGIN, SAVE), 60),
        ("idle", (), 0),
        ("done", (START, BEGIN, {**STOPPED, "status": 0, "step": 100}), 100),
    ],
)
def test_a_run_that_nobody_holds(tmp_path, state, events, steps):
    folder = made(tmp_path / "run", events=events, steps=range(10, steps + 1, 10), saved=[steps] if steps else [])
    seen = look(folder)
    assert (seen.state, seen.step) == (state, steps)
    assert seen.error == ("OSError: x" if state == "failed" else None)
    assert (seen.goodput is None) == (state == "idle")


@pytest.mark.parametrize(
    ("state", "changes", "age"),
    [
        ("dead", {"pid": 2**22 + 1}, 0),  # beyond the largest process number
        ("dead", {"process_started": 5.0}, 0),
        ("dead", {"machine": "far", "host": "far"}, 2 * SILENT),
        ("running", {"machine": "far", "host": "far"}, SILENT / 2),
        ("silent", {}, 2 * SILENT),
    ],
)
def test_a_run_with_a_record_of_its_holder(tmp_path, state, changes, age):
    folder = made(tmp_path / "run")
    now = time.time()
    record_of(folder, beat=now - age, **changes)
    os.utime(folder / RECORD, (now - age, now - age))
    seen = look(folder)
    assert seen.state == state
    assert seen.host == changes.get("host", seen.host)


def test_what_a_killed_session_lost():
    """Ten steps a second; killed at step 60 having saved 50, gone on from there; then done."""
    events = [START, BEGIN, SAVE, KILLED]
    events += [{**START, "time": NOW - 30}, {"event": "begin", "time": NOW - 20, "step": 50, "lost_steps": 10}]
    second = {"compile": 4.0, "restore": 2.0, "step": 15.0, "data": 1.0, "checkpoint": 2.0}
    events += [{"event": "end", "time": NOW - 5, "status": 0, "step": 100, "seconds": second}]
    found = goodput.measure(events, live=False, until=0.0, saved=100, logged=[{"step": 100}])
    assert (found.sessions, found.lost_steps) == (2, 10)
    assert found.wall == pytest.approx(65 + 25) and found.between == pytest.approx(5)
    expected = {"steps": 40 + 15, "compile": 9, "restore": 2, "data": 3, "checkpoint": 5}
    expected |= {"lost": 45 - 35, "other": (55 - 50) + (25 - 24)}
    assert found.seconds == pytest.approx(expected)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)
    assert found.share == pytest.approx(55 / 90)


def test_steps_that_a_later_session_went_back_behind_did_not_count():
    """The checkpoint of step 50 was damaged: the second session began at 20."""
    early = {"event": "save", "time": NOW - 70, "step": 20, "seconds": {"compile": 5.0, "step": 16.0}}
    again = [{**START, "time": NOW - 30}, {"event": "begin", "time": NOW - 20, "step": 20, "lost_steps": 40}]
    found = goodput.measure([START, BEGIN, early, SAVE, KILLED, *again], live=True, until=NOW, saved=50, logged=[])
    assert found.seconds["steps"] == 16
    assert found.seconds["lost"] == pytest.approx((40 - 16) + 2 + 3 + 10)
    assert found.lost_steps == 40


def test_a_dead_run_loses_what_it_did_since_its_checkpoint(tmp_path):
    folder = made(tmp_path / "run")
    record_of(folder, pid=2**22 + 1, beat=NOW - 20)
    for name in (RECORD, "metrics.jsonl"):
        os.utime(folder / name, (NOW - 20, NOW - 20))
    seen = look(folder)
    assert seen.goodput.wall == pytest.approx(80) and seen.goodput.seconds["steps"] == 40
    assert seen.goodput.seconds["lost"] == pytest.approx(25) and seen.goodput.lost_steps == 10


def test_what_is_damaged_is_named_and_ends_nothing(tmp_path, capsys):
    whole = made(tmp_path / "runs" / "whole")
    for name, config in (("null", "null"), ("list", "[]"), ("empty", ""), ("torn", '{"steps": ')):
        made(tmp_path / "runs" / name, config=config)
    with (whole / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 70, "lo\n\x00\x00\n[3]\n{"step": "x"}\n{"step": 70, "loss": NaN, "seconds": 3}\n{"step": 80'
        )
    with (whole / "sessions.jsonl").open("a") as file:
        file.write('{"event": "save"\n{"event": "save"}\n{"event": 3, "time": "x"}\n')
    seen = look(whole)
    assert (seen.step, seen.loss, seen.state) == (70, None, "dead")
    assert seen.damaged == ("metrics.jsonl: 3 damaged lines", "sessions.jsonl: 1 damaged lines")
    assert main(["status", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 + 5 + 2 + 4
    assert "list: " in out and "config.json: holds no configuration, but []" in out
    assert "config.json: is no JSON" in out


def test_as_json_it_has_everything_and_is_json(tmp_path, capsys):
    made(tmp_path / "one")
    made(tmp_path / "two", events=(START, BEGIN, SAVE, STOPPED), steps=[])
    assert main(["status", str(tmp_path), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (one["run"], two["run"], two["state"], two["step"]) == ("one", "two", "stopped", 50)
    assert two["goodput"]["share"] == pytest.approx(40 / 60, abs=0.01)
    assert math.isclose(sum(two["goodput"]["seconds"].values()), two["goodput"]["wall"])


def test_a_table_of_several_and_the_account_of_one(tmp_path, capsys):
    made(tmp_path / "runs" / "a", events=(START, BEGIN, SAVE, STOPPED), steps=range(10, 51, 10))
    made(tmp_path / "runs" / "b")
    assert main(["status", str(tmp_path / "runs" / "a")]) == 0
    head, row, account = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "loss", "tokens/s", "left", "saved", "goodput", "where"]
    assert row.split()[:8] == ["a", "stopped", "50", "of", "100", "2.5000", "40", "0:50"]
    assert account.startswith("1:00 in 1 session: steps 66.7%, compile 8.3%, restore 0.0%, data 3.3%, checkpoint 6.7%")
    assert main(["status", str(tmp_path / "runs"), str(tmp_path / "runs" / "a")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "a", "b"]


def test_folders_and_their_names(tmp_path):
    for name in ("x/a", "y/a", "y/b"):
        made(tmp_path / name)
    (tmp_path / "y" / "other").mkdir()
    found = named(find_workdirs([str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path / "y" / "b")]))
    assert [name for name, _ in found] == [str(tmp_path / "x/a"), str(tmp_path / "y/a"), "b"]
    for wrong in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=r"no workdir, and none in it|there is no such folder"):
            find_workdirs([str(wrong)])


def test_a_hundred_runs_at_once_and_without_jax(tmp_path):
    for number in range(100):
        made(tmp_path / f"run{number}")
    code = (
        "import sys, time; start = time.perf_counter(); from deconstruct.cli import main; "
        f"main(['status', {str(tmp_path)!r}]); print(time.perf_counter() - start); "
        "print([m for m in ('jax', 'flax', 'orbax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *lines, seconds, heavy = run.stdout.splitlines()
    assert len(lines) == 101 and heavy == "[]"
    assert float(seconds) < 5  # half a second on an idle machine
