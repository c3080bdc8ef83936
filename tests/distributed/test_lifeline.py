"""A process that is dead, stopped or has failed is noticed by the others, and named."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deconstruct.run.jsonl import read_jsonl
from tests.distributed.pair import Pair

ROOT = Path(__file__).parents[2]

# A process whose only peer gives signs of life three times as long as one may be silent, and then says this.
HEARD = """
import socket, sys, time
from deconstruct.distributed import lifeline
lifeline.BEAT, lifeline.GRACE = 0.01, 0.1
server = socket.create_server(("localhost", 0))
far = socket.create_connection(server.getsockname())
near, _ = server.accept()
lifeline.hold(0, [lifeline.Peer(1, "far", near, near.makefile("rb"))])
for _ in range(3 * lifeline.SILENT):
    far.sendall(b"{}\\n")
    time.sleep(lifeline.BEAT)
print("lives", flush=True)
far.sendall(sys.argv[1].encode())
time.sleep(20)
"""
REASON = '{"process": 1, "host": "far", "message": "has ended: no data", "mistake": true}'


@pytest.mark.parametrize(
    ("last", "status", "message"),
    [
        ("", 1, "has given no sign of life for 20 s"),
        ("{}\n{}\n" + REASON + "\n{", 2, "has ended: no data"),  # as they come together, and the next begun
    ],
)
def test_a_peer_is_heard_as_long_as_it_gives_signs_of_life(last, status, message):
    done = subprocess.run([sys.executable, "-c", HEARD, last], cwd=ROOT, capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout) == (status, "lives\n"), done.stderr
    assert done.stderr == f"process 1 (far) {message}; run the same command to go on from the latest checkpoint\n"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("number", "message", "limit"),
    [(signal.SIGKILL, "has died", 10), (signal.SIGSTOP, "has given no sign of life for 20 s", 40)],
)
def test_one_that_is_dead_or_stopped_is_named_by_the_other(folder, data, tmp_path, number, message, limit):
    """At once, or before JAX would abort without a name. Two pairs: of one the first is the victim, of the other the
    second."""
    pairs = [Pair(folder, tmp_path / str(victim), data[0]) for victim in (0, 1)]
    started = [[pair.start(i, "--config.steps=1000000") for i in range(2)] for pair in pairs]
    deadline = time.monotonic() + 120
    for victim, processes in enumerate(started):
        while len(read_jsonl(tmp_path / str(victim) / "metrics.jsonl")) < 5:
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.01)
    for victim, processes in enumerate(started):
        processes[victim].send_signal(number)
    begun = time.monotonic()
    for victim, processes in enumerate(started):
        out, _ = processes[1 - victim].communicate(timeout=60)
        assert processes[1 - victim].returncode == 1 and time.monotonic() - begun < limit, out
        said = f"process {victim} ({socket.gethostname()}) {message}; run the same command to go on from the latest"
        assert out.splitlines()[-1].startswith(said) and "Traceback" not in out and "Check failure" not in out
        processes[victim].kill()
        processes[victim].communicate(timeout=60)
