"""Runs that are killed, and disks that are full, for real. `kill_loop` is the same by hand, as long as one likes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deconstruct.run.checkpoint import finished_steps
from tests.tiny import CONFIG_FILE
from tests.train.kill_loop import Loop, train_words

ROOT = Path(__file__).parents[2]


def test_four_kills_change_nothing(prepared, tmp_path):
    loop = Loop(tmp_path / "loop", prepared, seed=2, clusters=0, steps=9)
    loop.run(4)
    assert sum(loop.kills.values()) == 4


@pytest.mark.proof
def test_thirty_kills_change_nothing(prepared, tmp_path):
    loop = Loop(tmp_path / "loop", prepared, seed=3)
    loop.run(30)
    assert sum(loop.kills.values()) == 30


@pytest.mark.proof
def test_ctrl_c_while_the_program_starts_is_one_line(prepared, tmp_path):
    """At moments of its processor's time, from the first import to the compiling of the step."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    for number, moment in enumerate((0.1, 0.4, 0.8, 1.2, 1.6, 2.4)):
        command = [sys.executable, "-m", "deconstruct", *train_words(config, prepared, tmp_path / str(number))]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and sum(psutil.Process(process.pid).cpu_times()[:2]) < moment:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
        assert process.returncode in (75, 130) and "Traceback" not in said, (moment, process.returncode, said)
        if process.returncode == 130:
            assert said.splitlines()[-1] == "deconstruct: interrupted" and not (tmp_path / str(number)).exists()


@pytest.fixture
def small_disk(tmp_path):
    """Two megabytes, which may become more."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a small disk takes root and mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def run(config, data, workdir):
    words = train_words(config, data, workdir, steps=150, checkpoint_every=10, **{"checkpoint.keep": 99})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "deconstruct", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "tokens_per_second")} for x in lines]


@pytest.mark.proof
def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(small_disk, prepared, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE)
    for _ in range(2):  # the second begins on a disk that is full
        done = run(config, prepared, small_disk / "run")
        assert done.returncode in (1, 2)  # 2 where not even the lock can be written
        assert done.stderr.splitlines()[-1].startswith("deconstruct train: ") and "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert finished_steps(small_disk / "run" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    done = run(config, prepared, small_disk / "run")
    assert done.returncode == 0 and "resuming from step" in done.stderr, done.stderr
    assert run(config, prepared, tmp_path / "whole").returncode == 0
    assert metrics(small_disk / "run") == metrics(tmp_path / "whole")
