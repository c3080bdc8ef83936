"""What is logged: whole lines, a file that a resumed run continues, TensorBoard beside it, and where time went."""

import json
import struct
import subprocess
import sys
import time

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from deconstruct.run.clock import Clock
from deconstruct.run.jsonl import append_jsonl, drop_torn_line, read_jsonl, truncate_jsonl
from deconstruct.run.metric_writer import MetricWriter


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "log.jsonl"


def write(path, steps, torn=""):
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps) + torn)


def steps_in(path):
    return [record["step"] for record in read_jsonl(path)]


def test_lines_come_back(path):
    assert read_jsonl(path) == []
    records = [{"step": 1, "loss": 2.5, "seconds": {"step": 0.1}}, {"step": 2, "text": "é\n"}]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 1.5}'])
def test_a_torn_last_line_is_left_out_and_dropped(path, torn):
    """Also one that ends where a number might go on: only the end of the line says that it is whole."""
    write(path, [1, 2], torn)
    assert steps_in(path) == [1, 2]
    drop_torn_line(path)
    append_jsonl(path, {"step": 4})
    assert steps_in(path) == [1, 2, 4]


def test_dropping_a_torn_line_leaves_a_whole_file_alone(path):
    drop_torn_line(path)
    assert not path.exists()
    write(path, [1, 2])
    before = path.stat().mtime
    drop_torn_line(path)
    assert steps_in(path) == [1, 2] and path.stat().mtime == before


@pytest.mark.parametrize(("last", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
@pytest.mark.parametrize("torn", ["", '{"step": 4'])
def test_truncating_goes_back_to_a_step(path, last, kept, torn):
    write(path, [1, 2, 3], torn)
    truncate_jsonl(path, last)
    assert steps_in(path) == kept
    append_jsonl(path, {"step": 10})
    assert steps_in(path) == [*kept, 10]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_a_line_is_on_disk_when_append_returns(path):
    code = f"""
import os
from etils import epath
from deconstruct.run.jsonl import append_jsonl
append_jsonl(epath.Path({str(path)!r}), {{"step": 1}})
os._exit(1)  # no buffers are flushed
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert steps_in(path) == [1]


def events_in(workdir):
    """The records of the one event file: length (8 bytes), checksum (4), event, checksum (4)."""
    (file,) = (workdir / "tensorboard").iterdir()
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def test_the_writer_continues_a_run_and_tells_tensorboard(tmp_path):
    workdir = epath.Path(tmp_path)
    write(workdir / "metrics.jsonl", range(1, 7))
    writer = MetricWriter(workdir, last_step=4)
    writer.write({"step": 5, "loss": 0.25, "seconds": {"step": 0.5, "data": 0.125}})
    writer.close()
    assert steps_in(workdir / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert read_jsonl(workdir / "metrics.jsonl")[-1]["loss"] == 0.25
    events = {}
    for event in events_in(workdir):
        events |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert events == {("loss", 5): 0.25, ("seconds/step", 5): 0.5, ("seconds/data", 5): 0.125}


def test_the_clock_adds_up_and_starts_anew():
    clock = Clock()
    for _ in range(2):
        with clock.measure("step"):
            time.sleep(0.02)
    with pytest.raises(ValueError), clock.measure("data"):
        raise ValueError
    seconds = clock.take()
    assert set(seconds) == {"step", "data"}
    assert 0.04 <= seconds["step"] < 2 and seconds["data"] < seconds["step"]
    assert clock.take() == {}
