"""One writer to a folder: processes that start together, die, freeze or live on other machines."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from deconstruct import lock
from deconstruct.lock import RECORD, LockLostError, alone_in, read_holder
from deconstruct.types import UserError

# Reads folders, one a line; tries for each and says what came of it; lets go at the next line.
RIVAL = """
import errno, fcntl, sys
from deconstruct.lock import alone_in
from deconstruct.types import UserError
def no_locks_here(*_):
    raise OSError(errno.ENOLCK, "no locks available")
if sys.argv[1] == "without":
    fcntl.flock = no_locks_here  # as on a file system that has none
print("ready", flush=True)
for line in sys.stdin:
    try:
        with alone_in(line.strip(), "--workdir", "train") as held:
            print("won", held.predecessor is not None, flush=True)
            sys.stdin.readline()
    except UserError as error:
        print(error, flush=True)
        sys.stdin.readline()
"""


def rival(flock="with"):
    process = subprocess.Popen(
        [sys.executable, "-c", RIVAL, flock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


@pytest.fixture
def quick(monkeypatch):
    """The times of the lock, a hundred times shorter."""
    for name in ("BEAT", "SILENT", "SETTLE"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 100)


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    """A folder, and one in an object store: fsspec's own, in memory, under the name of a bucket."""
    if request.param == "folder":
        return epath.Path(tmp_path)
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"

    fsspec.register_implementation("s3", Bucket, clobber=True)
    return epath.Path(f"s3://bucket/{tmp_path.name}")


def refused(message):
    return pytest.raises(UserError, match=message)


def leave_record(place, **changes):
    """The record of a trainer on another machine, which may be dead."""
    with alone_in(place, "--workdir", "train"):
        record = dataclasses.asdict(read_holder(place))
    record |= {"machine": "another", "host": "far", "pid": 77, "token": "other", **changes}
    place.mkdir(parents=True, exist_ok=True)
    (place / RECORD).write_text(json.dumps(record))
    return record


@pytest.mark.parametrize("flock", ["with", "without"])
def test_of_two_that_start_together_one_wins_twenty_times(tmp_path, flock):
    rivals = [rival(flock), rival(flock)]
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        for process in rivals:
            tell(process, folder)
        answers = [process.stdout.readline() for process in rivals]
        assert sorted(answer.startswith("won") for answer in answers) == [False, True]
        winner = rivals[answers[0].startswith("--")]
        (refused,) = (answer for answer in answers if not answer.startswith("won"))
        assert f"--workdir={folder}: another train is writing here: host " in refused
        assert f", process {winner.pid}, since 20" in refused and "last sign of life 0:0" in refused
        for process in rivals:
            tell(process, "")
    for process in rivals:
        process.communicate()
        assert process.returncode == 0
    assert not list(tmp_path.glob(f"*/{RECORD}"))


@pytest.mark.parametrize("flock", ["with", "without"])
def test_a_killed_holder_is_taken_over_from_in_one_line(tmp_path, flock, caplog):
    holder = rival(flock)
    tell(holder, tmp_path)
    assert holder.stdout.readline() == "won False\n"
    assert read_holder(tmp_path).pid == holder.pid and not read_holder(tmp_path).gone()
    holder.kill()
    deadline = time.monotonic() + 10
    while not read_holder(tmp_path).gone():  # a zombie by now: nobody has asked how it ended
        assert time.monotonic() < deadline
    with caplog.at_level(logging.INFO), alone_in(tmp_path, "--workdir", "train") as held:
        assert held.predecessor.pid == holder.pid
        assert read_holder(tmp_path).pid == os.getpid()
    (line,) = (record.message for record in caplog.records)
    assert line.startswith(f"--workdir={tmp_path}: taking over from a train that is gone: host ")
    holder.communicate()


def test_a_process_of_the_same_number_is_another(tmp_path):
    with alone_in(tmp_path, "--workdir", "train"):
        me = read_holder(tmp_path)
    assert not me.gone()
    assert dataclasses.replace(me, process_started=me.process_started - 60).gone()
    assert dataclasses.replace(me, machine="another").gone() is None


def test_one_process_has_it_once(place):
    place.mkdir(parents=True, exist_ok=True)
    with alone_in(place, "--workdir", "train"):
        with (
            refused(rf"another train is writing here: .* process {os.getpid()}"),
            alone_in(place, "--workdir", "train"),
        ):
            pass
        assert read_holder(place).pid == os.getpid()
    assert read_holder(place) is None
    with alone_in(place, "--workdir", "train") as held:
        assert held.predecessor is None


def test_a_silent_holder_of_another_machine_is_taken_over_from(place, quick, caplog):
    leave_record(place)
    started = time.monotonic()
    with caplog.at_level(logging.INFO), alone_in(place, "--workdir", "train") as held:
        assert (held.predecessor.host, held.predecessor.pid) == ("far", 77)
    assert time.monotonic() - started >= lock.SILENT
    waiting, taking = (record.message for record in caplog.records)
    assert "waiting up to 1 s for a sign of life of a train: host far, process 77" in waiting
    assert "taking over from a train that is gone: host far, process 77" in taking


def test_a_holder_of_another_machine_that_gives_signs_of_life_keeps_it(place, quick):
    record = leave_record(place)
    ended = threading.Event()

    def live():
        while not ended.wait(lock.BEAT):
            (place / RECORD).write_text(json.dumps(record | {"beat": time.time()}))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with refused("another train is writing here: host far, process 77"), alone_in(place, "--workdir", "train"):
            pass
    finally:
        ended.set()
        thread.join()
    assert read_holder(place).token == "other"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 3}', {"pid": 3.5}, {"pid": -3}, {"beat": "x"}, {"host": None}]
)
def test_a_record_that_cannot_be_read_is_watched_as_well(tmp_path, quick, text):
    if isinstance(text, dict):
        leave_record(epath.Path(tmp_path), **text)
    else:
        (tmp_path / RECORD).write_text(text)
    assert read_holder(tmp_path) is None
    with alone_in(tmp_path, "--workdir", "train"):
        assert read_holder(tmp_path).pid == os.getpid()


def test_signs_of_life_are_given_and_a_lost_lock_is_noticed(place, quick):
    place.mkdir(parents=True, exist_ok=True)
    with alone_in(place, "--workdir", "train") as held:
        first = read_holder(place).beat
        time.sleep(5 * lock.BEAT)
        held.check()
        assert read_holder(place).beat > first
        leave = json.loads((place / RECORD).read_text()) | {"token": "other", "host": "far"}
        (place / RECORD).write_text(json.dumps(leave))
        time.sleep(5 * lock.BEAT)
        with pytest.raises(LockLostError, match=r"is held by another train now: host far, .*; this process must not"):
            held.check()
    assert read_holder(place).token == "other"  # it is not this one's to remove


def test_it_keeps_no_process_alive(tmp_path):
    code = f"from deconstruct.lock import Lock; Lock({str(tmp_path)!r}, '--workdir', 'train').acquire()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=5 + lock.BEAT / 2)
    assert read_holder(tmp_path).gone()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    gone = tmp_path / "gone"
    with refused(r"--workdir=.*gone: cannot be written to \(No such file"), alone_in(gone, "--workdir", "train"):
        raise AssertionError("it is held")
    assert not gone.exists()
