"""A Dask cluster does the work of prepare: a scheduler and two workers, as real processes, of which one is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_text import make_documents, options

import deconstruct
from deconstruct.data.prepare import prepare
from deconstruct.types import UserError
from tests.need import need

need("distributed", extra="dask")
pytestmark = pytest.mark.proof

FILES = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty files, some seconds of work."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(FILES):
        lines = [json.dumps({"text": document}) for document in make_documents(150, 1000, seed=number)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def cluster(tmp_path):
    """The scheduler's address, and its two workers."""
    processes = []

    def start(*words, package=None):
        places = [str(package)] if package else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, *(p for p in sys.path if p)])}
        log = open(tmp_path / f"{len(processes)}.log", "w")  # noqa: SIM115
        command = [sys.executable, "-m", "dask", *map(str, words)]
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log))
        return processes[-1]

    file = tmp_path / "scheduler.json"
    start("scheduler", "--port=0", "--host=127.0.0.1", "--no-dashboard", "--scheduler-file", file)
    workers = [
        start("worker", "--scheduler-file", file, "--nthreads=1", "--no-nanny", "--no-dashboard") for _ in range(2)
    ]
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"dask:{json.loads(file.read_text())['address']}", workers, start
    for process in reversed(processes):
        process.kill()
        process.wait()


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Parts(threading.Thread):
    """Watches the parts as they are finished: how often each was written."""

    def __init__(self, output):
        super().__init__(daemon=True)
        self.output, self.seen, self.going = output, dict[str, set[tuple[int, int]]](), True

    def run(self):
        while self.going:
            for path in self.output.glob(".partial/*/*.json"):
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue
                self.seen.setdefault(path.name, set()).add((found.st_ino, found.st_mtime_ns))
            time.sleep(0.005)


def timed(prepare_options):
    began = time.monotonic()
    manifest = prepare(prepare_options)
    seconds = time.monotonic() - began
    return sum(manifest[name]["tokens"] for name in ("train", "validation")) / seconds


def test_a_worker_that_is_killed_costs_its_unit(tmp_path, text, cluster, capsys):
    engine, workers, _ = cluster
    rate = timed(options(tmp_path / "own", text, workers=2, vocab_size=400))
    parts = Parts(tmp_path / "dask")
    parts.start()
    killed = threading.Event()

    def kill():
        while len(parts.seen) < 6:
            time.sleep(0.005)
        workers[0].send_signal(signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    with_a_kill = timed(options(tmp_path / "dask", text, workers=0, vocab_size=400, executor=engine))
    parts.going = False
    parts.join()
    assert killed.is_set() and workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert everything(tmp_path / "own") == everything(tmp_path / "dask")
    assert len(everything(tmp_path / "own")) == 5  # two shards, the tokenizer, the manifest, the lock
    assert len(parts.seen) == FILES and all(len(times) == 1 for times in parts.seen.values())
    one = timed(options(tmp_path / "one", text, workers=1, vocab_size=400))
    assert everything(tmp_path / "own") == everything(tmp_path / "one")
    with capsys.disabled():
        print(
            f"\nprepare, tokens/s: {rate:,.0f} by two processes, {one:,.0f} by one, {with_a_kill:,.0f} by two Dask "
            "workers of which one was killed"
        )


def test_two_workers_write_what_one_process_writes(tmp_path, text, cluster, capsys):
    engine, workers, _ = cluster
    rate = timed(options(tmp_path / "dask", text, workers=0, vocab_size=400, executor=engine))
    timed(options(tmp_path / "own", text, workers=1, vocab_size=400))
    assert everything(tmp_path / "dask") == everything(tmp_path / "own")
    assert all(worker.poll() is None for worker in workers)
    with capsys.disabled():
        print(f"\nprepare, tokens/s: {rate:,.0f} by two Dask workers")


def test_mistakes(tmp_path, texts, cluster):
    engine, workers, start = cluster
    for others, message in [
        ({"executor": "dask"}, "--executor=dask: expected processes, or dask:ADDRESS"),
        ({"executor": "threads"}, "--executor=threads: expected processes"),
        ({"executor": "dask:tcp://127.0.0.1:1", "workers": 2}, "--workers=2: the workers are those of --executor"),
        ({"executor": "dask:tcp://127.0.0.1:1", "workers": 0}, "no scheduler answers there"),
        ({"executor": "dask:nonsense", "workers": 0}, "no scheduler answers there"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            prepare(options(tmp_path / "out", texts, **others))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--input=texts: must be absolute, as the workers of --executor start in"):
        prepare(options(tmp_path / "out", "texts", workers=0, executor=engine))
    for worker in workers:
        worker.kill()
        worker.wait()
    with pytest.raises(UserError, match="the scheduler has no worker; start one: dask worker"):
        prepare(options(tmp_path / "out", texts, workers=0, executor=engine))
    shutil.copytree(Path(deconstruct.__file__).parent, tmp_path / "old" / "deconstruct")
    with open(tmp_path / "old" / "deconstruct" / "data" / "split.py", "a") as file:
        file.write("# another version\n")
    start(
        "worker", engine.removeprefix("dask:"), "--nthreads=1", "--no-nanny", "--no-dashboard", package=tmp_path / "old"
    )
    with pytest.raises(UserError, match=r"tcp://.* has another version of deconstruct; install this one there"):
        prepare(options(tmp_path / "out", texts, workers=0, executor=engine))
