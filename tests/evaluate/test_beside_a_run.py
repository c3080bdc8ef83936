"""`evaluate --follow` beside a trainer that saves often and keeps one checkpoint, both real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.jsonl import read_jsonl
from tests.tiny import CONFIG_FILE
from tests.train.kill_loop import train_words

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 120, 2


@pytest.fixture
def start(tmp_path):
    """Starts the program; what it says goes into a file."""
    processes = []

    def begin(log, *words):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
        with (tmp_path / log).open("w") as file:
            command = [sys.executable, "-m", "deconstruct", *words]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def perplexities(workdir):
    return [(line["step"], line["value"]) for line in read_jsonl(workdir / "eval.jsonl") if line["metric"] != "nll"]


@pytest.mark.proof
def test_what_is_deleted_beside_the_evaluator_is_evaluated_whole_or_not_at_all(prepared, tmp_path, start, capsys):
    """Whole: with the numbers of a run that keeps everything."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE)
    run, twin = tmp_path / "run", tmp_path / "twin"
    common = {"steps": STEPS, "checkpoint_every": EVERY}
    follower = start("follower.log", "evaluate", f"--workdir={run}", "--follow", "--poll=0.01")
    trainer = start("trainer.log", *train_words(config, prepared, run, **common, **{"checkpoint.keep": 1}))
    assert trainer.wait(timeout=600) == 0, (tmp_path / "trainer.log").read_text()
    assert follower.wait(timeout=60) == 0, (tmp_path / "follower.log").read_text()
    assert finished_steps(run / "checkpoints") == [STEPS]
    steps = [step for step, _ in perplexities(run)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS and all(step % EVERY == 0 for step in steps)
    gone = (tmp_path / "follower.log").read_text().count("was deleted before it could be evaluated")
    with capsys.disabled():
        print(f"\nof {STEPS // EVERY} checkpoints {len(steps)} were evaluated, {gone} had gone when their turn came")
    assert len(steps) > 3 and gone > 3  # they did meet

    words = train_words(config, prepared, twin, **common, **{"checkpoint.keep": STEPS})
    assert start("twin.log", *words).wait(timeout=300) == 0, (tmp_path / "twin.log").read_text()
    words = ["evaluate", f"--workdir={twin}", f"--step={','.join(map(str, steps))}"]
    assert start("twin.log", *words).wait(timeout=300) == 0, (tmp_path / "twin.log").read_text()
    assert perplexities(run) == perplexities(twin)
