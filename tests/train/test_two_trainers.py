"""Two real trainers and one workdir, and the sign of life of one that is busy compiling."""

import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import portpicker
import pytest

from deconstruct.lock import RECORD, alone_in
from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.status import status
from deconstruct.run.workdir import Workdir
from deconstruct.train.loop import train
from deconstruct.types import UserError
from tests.train.test_run import run_config

ROOT = Path(__file__).parents[2]

# Trains in workdirs, one a line, and says what came of it.
TRAINER = """
import json, sys
from deconstruct.config import Config
from deconstruct.train.loop import train
from deconstruct.types import UserError
config = Config.from_dict(json.load(open(sys.argv[1])))
print("ready", flush=True)
for line in sys.stdin:
    try:
        print("ended", train(config, line.strip()), flush=True)
    except UserError as error:
        print(error, flush=True)
"""

# Compiles programs for some seconds while it holds a lock that beats every tenth of a second.
COMPILER = """
import sys, time
import jax, jax.numpy as jnp
from deconstruct import lock
lock.BEAT = 0.1
def program(x):
    for i in range(400):
        x = jnp.sin(x @ x) + i
    return x
lowered = jax.jit(program).lower(jnp.ones((32, 32)))
with lock.alone_in(sys.argv[1], "--workdir", "train"):
    print("compiling", flush=True)
    start = time.perf_counter()
    lowered.compile()
    print(time.perf_counter() - start, flush=True)
"""


@pytest.mark.proof
def test_of_two_trainers_that_start_together_one_trains_twenty_times(prepared, tmp_path):
    config = run_config(prepared, {"num_layers": 2}, variant="standard", layout="uniform", steps=10**6)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "config.json")]
    with (tmp_path / "log").open("w") as log:
        rivals = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            for _ in range(2)
        ]
    assert all(rival.stdout.readline() == "ready\n" for rival in rivals), (tmp_path / "log").read_text()
    for number in range(20):
        workdir = tmp_path / str(number)
        for rival in rivals:
            rival.stdin.write(f"{workdir}\n")
            rival.stdin.flush()
        # The first to say anything is the one refused: the other trains until it is asked to stop.
        answer, winner = next_answer(rivals)
        assert f"--workdir={workdir}: another train is writing here: host " in answer
        assert f", process {winner.pid}, since 20" in answer
        while not read_jsonl(Workdir(workdir).metrics):
            assert winner.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        seen = status(Workdir(workdir), "it")
        assert (seen.state, seen.pid) == ("running", winner.pid)
        winner.send_signal(signal.SIGTERM)
        assert winner.stdout.readline() == "ended 75\n"
        steps = [record["step"] for record in read_jsonl(Workdir(workdir).metrics)]
        assert steps == list(range(1, len(steps) + 1))
        events = [event["event"] for event in read_jsonl(Workdir(workdir).sessions)]
        assert events[:2] == ["start", "begin"] and events[-1] == "end" and set(events[2:-1]) == {"save"}
        assert status(Workdir(workdir), "it").state == "stopped"
    for rival in rivals:
        rival.communicate()
        assert rival.returncode == 0


@pytest.mark.proof
def test_commands_that_are_refused_beside_a_run_cost_it_nothing(prepared, tmp_path):
    """Another seed, and the same command again, while there is a save under way at nearly every moment."""
    model = {"num_layers": 1}
    config = run_config(prepared, model, variant="standard", layout="uniform", steps=10**6, checkpoint_every=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command, workdir = [sys.executable, "-c", TRAINER, str(tmp_path / "config.json")], tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    run.stdin.write(f"{workdir}\n")
    run.stdin.flush()
    while len(finished_steps(workdir / "checkpoints")) < 3:
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    for number in range(20):
        with pytest.raises(UserError, match=r"config.seed=1, but this workdir holds a run with 0; set it back"):
            train(config.replace(seed=1), workdir)
        if number % 10 == 0:
            with pytest.raises(UserError, match=rf"another train is writing here: .* process {run.pid}, since"):
                train(config, workdir)
    assert run.stdout.readline() == "ready\n" and run.poll() is None, (tmp_path / "log").read_text()
    run.send_signal(signal.SIGTERM)
    assert run.stdout.readline() == "ended 75\n", (tmp_path / "log").read_text()
    run.communicate()
    steps = [record["step"] for record in read_jsonl(Workdir(workdir).metrics)]
    assert steps == list(range(1, steps[-1] + 1)) and finished_steps(workdir / "checkpoints")[-1] == steps[-1]


def next_answer(rivals):
    """The next line that one of two processes says, and the other process."""
    with selectors.DefaultSelector() as waiting:
        for rival in rivals:
            waiting.register(rival.stdout, selectors.EVENT_READ, rival)
        found = waiting.select(timeout=120)
    assert found, "neither of two trainers was refused"
    speaker = found[0][0].data
    (other,) = (rival for rival in rivals if rival is not speaker)
    return speaker.stdout.readline(), other


@pytest.mark.proof
def test_no_sign_of_life_is_missed_while_a_program_is_compiled(tmp_path):
    command = [sys.executable, "-c", COMPILER, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    assert process.stdout.readline() == "compiling\n"
    beats = []
    while process.poll() is None:
        try:
            beat = (tmp_path / RECORD).stat().st_mtime
        except FileNotFoundError:  # it has ended
            break
        if not beats or beat != beats[-1]:
            beats.append(beat)
    out, _ = process.communicate()
    assert process.returncode == 0
    seconds = float(out)
    gaps = [later - earlier for earlier, later in itertools.pairwise(beats)]
    assert seconds > 1, "too quick a compilation to show anything"
    assert len(beats) > seconds / 0.1 / 3  # on a busy machine some come late
    assert max(gaps) < 1


@pytest.mark.proof
def test_all_processes_of_a_run_that_is_refused_end_and_say_why(prepared, tmp_path):
    config = tmp_path / "config.py"
    values = {"data": str(prepared), "batch_size": 8, "sequence_length": 12, "steps": 4}
    model = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 4}
    config.write_text(
        "from deconstruct.config import default_config\n"
        f"def get_config():\n    config = default_config()\n    config.update({values!r})\n"
        f"    config.model.update({model!r})\n    config.optimizer.warmup_steps = 1\n    return config\n"
    )
    workdir, port = tmp_path / "run", portpicker.pick_unused_port()
    workdir.mkdir()
    command = [sys.executable, "-m", "deconstruct.cli", "train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--coordinator=localhost:{port}", "--num-processes=2"]
    plain = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    with alone_in(workdir, "--workdir", "train"):
        processes = [
            subprocess.Popen([*command, f"--process-id={i}"], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=plain)
            for i in range(2)
        ]
        said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], "\n".join(said)
    for text in said:
        assert f"--workdir={workdir}: another train is writing here: host " in text.strip().splitlines()[-1]
    assert f"process {os.getpid()}, since" in said[1] and "process 0 (" in said[1]
    assert sorted(path.name for path in workdir.iterdir()) == [".lock"]
