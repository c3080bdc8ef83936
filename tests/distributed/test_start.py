"""How processes find each other, and what each of them says when one is missing or was given something else."""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import portpicker
import pytest

from deconstruct.distributed import runtime
from deconstruct.distributed.agreement import _difference
from deconstruct.distributed.cluster import Place, find_place
from deconstruct.distributed.meeting import meet
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import PeerError, UserError
from tests.distributed.pair import Pair, ended

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-008],other1",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def place_of(monkeypatch, environment, *words):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "SKYPILOT_", "CUDA_VISIBLE", "KUBERNETES_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    runtime.add_arguments(parser)
    return find_place(parser.parse_args(words), 1)


@pytest.mark.parametrize(
    ("environment", "words", "place"),
    [
        ({}, (), None),
        (SLURM, (), None),  # only where it is asked for
        (SLURM, ("--distributed",), Place("node007:61586", 6, 3, (1,))),  # 4242 % 4096 + 61440
        (SLURM | EIGHT, ("--distributed", "--process-per=gpu"), Place("node007:61586", 6, 3, (1,))),
        (SLURM | EIGHT, ("--distributed", "--process-per=node"), Place("node007:61586", 6, 3, ())),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "5"},  # --gpus-per-task=1: JAX would ask for the second of one GPU
            ("--distributed", "--process-per=gpu"),
            Place("node007:61586", 6, 3, (0,)),
        ),
        (OPEN_MPI, ("--distributed", "--process-per=node"), Place("10.96.0.1:62624", 4, 2, ())),
        (SKYPILOT, ("--distributed",), Place("10.0.0.5:8476", 2, 1, (), 16)),
        (SKYPILOT | SLURM, ("--distributed",), Place("10.0.0.5:8476", 2, 1, (), 16)),
        (
            SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"},
            ("--distributed", "--process-per=node"),
            Place("10.0.0.5:8476", 2, 1, (), None),
        ),
        (
            {},
            ("--coordinator=a:1", "--num-processes=3", "--process-id=2"),
            Place("a:1", 3, 2, None),
        ),
        (
            SLURM,
            ("--coordinator=a:1", "--num-processes=3", "--process-id=2", "--process-per=node"),
            Place("a:1", 3, 2, ()),
        ),
    ],
)
def test_where_a_process_stands(monkeypatch, environment, words, place):
    assert place_of(monkeypatch, environment, *words) == place


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ("--distributed",), r"--distributed: nothing here says where the others are \(SLURM's srun, a TPU pod"),
        (
            SLURM | EIGHT,
            ("--distributed",),
            r"this process sees 8 GPUs \(CUDA_VISIBLE_DEVICES=0,1,.*--process-per=gpu, or all, --process-per=node",
        ),
        ({}, ("--process-per=gpu",), r"--process-per=gpu: this process is alone; --distributed finds the others"),
        (
            SLURM | {"SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
            ("--distributed", "--process-per=gpu"),
            r"process 2 of its machine, but CUDA_VISIBLE_DEVICES=0,1 has 2 GPUs",
        ),
        (SKYPILOT, ("--distributed", "--process-per=gpu"), r"SkyPilot starts one process per node"),
        (
            {},
            ("--coordinator=a:1", "--num-processes=2", "--process-id=0", "--process-per=gpu"),
            r"nothing here says which process of its machine this is \(SLURM_LOCALID or OMPI",
        ),
        ({}, ("--coordinator=a", "--num-processes=2", "--process-id=0"), r"--coordinator=a: expected HOST:PORT"),
        ({}, ("--coordinator=a:1", "--num-processes=2", "--process-id=2"), r"--process-id=2: expected 0 to 1"),
        (
            {},
            ("--coordinator=a:1", "--num-processes=2", "--process-id=0", "--distributed"),
            r"--coordinator=a:1 says where",
        ),
    ],
)
def test_places_that_cannot_be(monkeypatch, environment, words, message):
    with pytest.raises(UserError, match=message):
        place_of(monkeypatch, environment, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--expect-devices=3",), r"--expect-devices=3: 8 cpu devices are here, 8 on each of 1 processes"),
        (("--start-timeout=0",), r"--start-timeout=0: must be at least 1 second"),
    ],
)
def test_a_process_alone_checks_too(words, message):
    parser = argparse.ArgumentParser()
    runtime.add_arguments(parser)
    runtime.start(parser.parse_args(["--expect-devices=8"]))
    with pytest.raises(UserError, match=message):
        runtime.start(parser.parse_args(words))


@pytest.mark.proof
@pytest.mark.parametrize(
    ("words", "visible"), [((), "1"), (("--process-per=gpu",), "1"), (("--process-per=node",), "all")]
)
def test_the_gpus_of_a_process_are_what_jax_is_told(words, visible):
    """Under SLURM, where JAX by itself takes the GPU of the local rank."""
    script = (
        "import sys, argparse, jax\n"
        "from deconstruct.distributed import runtime\n"
        "parser = argparse.ArgumentParser(); runtime.add_arguments(parser)\n"
        "runtime.start(parser.parse_args(sys.argv[1:]))\n"
        "print(jax.config.values['jax_cuda_visible_devices'])\n"
    )
    place = [f"--coordinator=localhost:{portpicker.pick_unused_port()}", "--num-processes=1", "--process-id=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *place, *words],
        env=os.environ | SLURM | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended(process) == (0, visible)


def meeting(*processes, number=None, timeout=5.0, visitor=None):
    """Lets these processes meet, each in a thread; what each has raised, or None."""
    port = portpicker.pick_unused_port()
    ended = [None] * len(processes)

    def take_part(slot, process, of):
        try:
            for peer in meet(Place(f"localhost:{port}", of, process), timeout):
                peer.lines.close()
                peer.connection.close()
        except (PeerError, UserError) as error:
            ended[slot] = error

    threads = [
        threading.Thread(target=take_part, args=(slot, *(p if isinstance(p, tuple) else (p, number or len(processes)))))
        for slot, p in enumerate(processes)
    ]
    threads[0].start()
    if visitor:
        visitor(port)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_all_have_come():
    assert meeting(2, 0, 3, 1) == [None] * 4
    assert meeting(0) == [None]


def test_a_process_that_does_not_come_is_named_to_all():
    errors = meeting(0, 2, number=4, timeout=0.5)
    assert [type(error) for error in errors] == [PeerError] * 2
    for error in errors:
        assert "processes 1, 3 of 4 did not come within 0.5 s to localhost:" in str(error)
    (error,) = meeting(1, number=2, timeout=0.5)
    assert "process 0 was not found at localhost:" in str(error) and "this is process 1" in str(error)


def test_processes_that_were_told_different_things():
    for error in meeting((0, 2), (1, 3)):
        assert isinstance(error, UserError) and "process 1 (" in str(error) and "told of 3 processes" in str(error)
    messages = {str(error) for error in meeting(0, 1, 1, number=3)}
    assert any("two processes are number 1" in message for message in messages)


def test_a_port_in_use_and_strangers():
    message = r"cannot listen on port \d+ here \(Address already in use\)"
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match=message):
        meet(Place(f"localhost:{taken.getsockname()[1]}", 2, 0), 1)

    def scan(port):
        for _ in range(100):  # until process 0 listens
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)):
                break
            time.sleep(0.02)
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"{}\n", b"[1]\n", b"\xff\n"):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(words)

    assert meeting(0, 1, visitor=scan) == [None, None]


def test_the_odd_one_of_many_is_named():
    def said(*values):
        return [{"host": f"h{i}", "value": {"a": 1, "b": value}} for i, value in enumerate(values)]

    assert _difference(said(2, 2, 2)) == ""
    assert _difference(said(5, 2, 2)) == "process 0 (h0) has b=5 where process 1 has 2"
    assert _difference(said("x", "y")) == "process 1 (h1) has b=y where process 0 has x"
    assert _difference(said(1, 3, 1, 4, 1)) == "process 1 (h1) (and 1 more processes) has b=3 where process 0 has 1"
    assert "b=nothing" in _difference([*said(1, 1), {"host": "h2", "value": {"a": 1}}])


# Real processes, started by the program itself.


@pytest.mark.proof
def test_another_learning_rate_is_named_by_both(folder, data, tmp_path):
    results = Pair(folder, tmp_path / "run", data[0]).run((), ("--config.learning_rate=0.25",))
    for status, line in results:
        assert status == 2
        assert line.startswith("deconstruct train: process 1 (")
        assert "has config.learning_rate=0.25 where process 0 has 0.0004; start the same command everywhere" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_what_else_may_differ_is_named_by_both(folder, data, tmp_path):
    workdir = tmp_path / "run"
    for second, status, message in (
        ((f"--config.data={data[1]}",), 2, r"has config.data=fingerprint"),
        ((f"--workdir={tmp_path / 'elsewhere'}",), 2, r"has --workdir="),
        (("--config.data=nowhere",), 2, "nowhere: no prepared data here"),
        (("--num-processes=3",), 2, "was told of 3 processes, process 0 of 2"),
    ):
        for found, line in Pair(folder, workdir, data[0]).run((), second):
            assert found == status and message in line and line.count("deconstruct train") == 1, line
    expected = ("--expect-devices=4",)
    for found, line in Pair(folder, workdir, data[0]).run(expected, expected):
        assert found == 2 and "--expect-devices=4: 2 cpu devices are here, 1 on each of 2 processes" in line
    assert not workdir.exists()


@pytest.mark.proof
def test_machines_that_are_not_alike_and_another_program(folder, data, tmp_path):
    for environment, message in (
        ({"JAX_NUM_CPU_DEVICES": "2"}, "has devices=2 where process 0 has 1; all machines must be alike"),
        ({"JAX_DEFAULT_MATMUL_PRECISION": "highest"}, "has program of the step="),
    ):
        pair = Pair(folder, tmp_path / "run", data[0])
        for process in (pair.start(0), pair.start(1, **environment)):
            status, line = ended(process)
            assert status == 2 and "process 1 (" in line and message in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_a_process_that_never_comes_or_falls_silent(folder, data, tmp_path):
    pair = Pair(folder, tmp_path / "run", data[0])
    status, line = ended(pair.start(0, "--start-timeout=3"))
    assert status == 1 and "process 1 of 2 did not come within 3 s" in line
    status, line = ended(pair.start(1, "--start-timeout=3"))
    assert status == 1 and "process 0 was not found at localhost:" in line

    script = (  # the second process comes to a check eight seconds late
        "import sys, time, argparse, jax\n"
        "from deconstruct.distributed import runtime, agreement\n"
        "parser = argparse.ArgumentParser(); runtime.add_arguments(parser)\n"
        "arguments = parser.parse_args(sys.argv[1:]); runtime.start(arguments)\n"
        "time.sleep(8 * arguments.process_id)\n"
        "try: agreement.agree('sleep', dict)\n"
        "except Exception as error: print(type(error).__name__, error, flush=True)\n"
    )
    port = portpicker.pick_unused_port()
    place = [f"--coordinator=localhost:{port}", "--num-processes=2", "--start-timeout=3"]
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", script, *place, f"--process-id={number}"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    )
    status, line = ended(first)
    assert (status, line) == (0, "PeerError process 1 has not come to the check of 'sleep' within 3 s")
    second.wait(timeout=60)


@pytest.mark.proof
def test_a_compilation_cache_in_a_shared_folder(folder, data, tmp_path):
    """Process 0 writes, both read: the second start compiles nothing that took a second."""
    cache = tmp_path / "cache"
    words = (f"--compilation-cache={cache}",)
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_LOG_COMPILES": "0"}
    entries = []
    for workdir in ("one", "two"):
        pair = Pair(folder, tmp_path / workdir, data[0])
        for process in [pair.start(number, *words, **environment) for number in range(2)]:
            assert ended(process)[0] == 0
        entries.append({path.name for path in cache.iterdir() if path.name.endswith("-cache")})
    assert entries[0] and entries[0] == entries[1]
    first, second = (read_jsonl(tmp_path / workdir / "metrics.jsonl")[0]["seconds"] for workdir in ("one", "two"))
    assert second["compile"] < first["compile"]
