"""Sweeps: what they expand to, and that what has finished is not run again."""

import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deconstruct.run import checkpoint
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "sweep.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_combination_has_a_workdir_named_by_what_sets_it_apart(sweep, folder, tmp_path):
    over = ["variant=mlp,hidden/window(size=4)", "config.learning_rate=1e-3,0.01", "config.seed=0,1"]
    runs = sweep.expand(f"{folder}/tiny.py", f"{tmp_path}/", over, ["--config.steps=7", "--process-per=gpu"])
    assert len(runs) == len({run.workdir for run in runs}) == 8
    assert [run.name for run in runs[:2]] == [f"variant=mlp,learning_rate=1e-3,seed={seed}" for seed in (0, 1)]
    assert runs[-1].name == "variant=hidden-window(size=4),learning_rate=0.01,seed=1"
    assert runs[-1].train == (
        f"--config={folder}/tiny.py:variant=hidden/window(size=4)",
        f"--workdir={tmp_path}/{runs[-1].name}",
        "--config.steps=7",
        "--process-per=gpu",
        "--config.learning_rate=0.01",
        "--config.seed=1",
    )
    assert not any(run.finished for run in runs)


def test_an_argument_that_is_given_stays(sweep):
    (run, _) = sweep.expand("configs/paper.py:size=70m,layout=1+3", "runs", ["variant=mlp,approximate"], [])
    assert run.train[0] == "--config=configs/paper.py:size=70m,layout=1+3,variant=mlp"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["config.seed"], "--over=config.seed: expected KEY=VALUE,VALUE"),
        (["config.seed=1,1"], "each key and each value once"),
        (["config.seed=1", "config.seed=2"], "each key and each value once"),
        (["config.sed=1"], "config.sed is unknown; did you mean seed?"),
        (["config.seed=1,x"], "config.seed=x: expected a whole number"),
        (["size=70m"], "'size=70m': expected variant="),
        (["variant=mlp,mpl"], "variant 'mpl' is unknown; did you mean mlp?"),
        (["config.model.dtype=float32", "config.dtype=a"], "config.dtype is unknown"),
        (["variant=hidden/window,hidden-window"], "two runs would be named variant=hidden-window"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(sweep, folder, tmp_path, over, message, capsys):
    with pytest.raises(UserError) as refused:
        sweep.expand(f"{folder}/tiny.py", str(tmp_path), over, [])
    assert message in str(refused.value)
    words = [f"--config={folder}/tiny.py", f"--workdir={tmp_path}", *(f"--over={entry}" for entry in over)]
    assert sweep.main(words) == 2
    assert capsys.readouterr().err.startswith("sweep.py: ") and not list(tmp_path.iterdir())


def test_another_environment_is_named():
    done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"sweep.py: {sys.executable} has no deconstruct; activate the environment that has it\n"


def test_dry_runs(sweep, folder, tmp_path, capsys):
    words = [f"--config={folder}/tiny.py", f"--workdir={tmp_path}", "--over=config.seed=0,1", "--dry-run"]
    assert sweep.main([*words, "--launcher=launch/skypilot.py --accelerators=H100:8 --"]) == 0
    counted, *lines = capsys.readouterr().out.splitlines()
    assert counted == "2 runs, 0 of them finished"
    assert [shlex.split(line)[:3] for line in lines] == [["launch/skypilot.py", "--accelerators=H100:8", "--"]] * 2

    assert sweep.main([*words, "--slurm=--gpus-per-node=8 --time=1:00", "--jobs=1", "--", "--process-per=node"]) == 0
    _, command, _, *lines = capsys.readouterr().out.splitlines()
    *submit, script, file = shlex.split(command)
    assert submit == ["sbatch", "--array=1,2%1", "--output=%x-%A_%a.log", "--gpus-per-node=8", "--time=1:00"]
    assert script.endswith("launch/slurm.sh") and file.startswith(f"--runs={tmp_path}/runs-")
    assert [shlex.split(line)[2] for line in lines] == ["--process-per=node"] * 2
    with pytest.raises(SystemExit):  # a slip is not handed on to the runs
        sweep.main([*words[:-1], "--dryrun"])
    assert not list(tmp_path.iterdir())


def test_what_has_finished_is_known_by_its_last_checkpoint(sweep, folder, tmp_path, monkeypatch, capsys):
    """An unfinished save is none, and more steps make a run unfinished again."""
    done = tmp_path / "seed=0" / "checkpoints" / "4" / "meta"
    done.mkdir(parents=True)
    (done / "data.json").write_text("{}")
    (tmp_path / "seed=1" / "checkpoints" / "4.orbax-checkpoint-tmp" / "meta").mkdir(parents=True)
    assert checkpoint.latest_step(tmp_path / "seed=0" / "checkpoints") == 4
    finished = lambda *common: [  # noqa: E731
        run.finished for run in sweep.expand(f"{folder}/tiny.py", str(tmp_path), ["config.seed=0,1"], [*common])
    ]
    assert finished() == [True, False]
    assert finished("--config.steps=5") == [False, False]
    words = [f"--config={folder}/tiny.py", f"--workdir={tmp_path}", "--over=config.seed=0,1", "--dry-run"]
    assert sweep.main([*words, "--slurm="]) == 0
    assert "--array=2 " in capsys.readouterr().out


@pytest.mark.proof
def test_a_sweep_here_one_killed_and_repeated(environment, folder, data, tmp_path):
    """Four runs, two at a time; one is killed, and the same command runs that one alone."""
    command = [sys.executable, str(SCRIPT), f"--config={folder}/tiny.py", f"--workdir={tmp_path}", "--jobs=2"]
    command += ["--over=variant=standard,mlp", "--over=config.seed=0,1", f"--config.data={data}", "--config.steps=150"]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "variant=mlp,seed=1" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while len(read_jsonl(metrics)) < 5:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    pids = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    (victim,) = [pid for pid in pids if b"variant=mlp,seed=1" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    subprocess.run(["kill", "-KILL", victim], check=True)
    out, _ = first.communicate(timeout=240)
    assert first.returncode == 1 and "variant=mlp,seed=1: ended with status -9" in out and out.count(": done") == 3

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0 and "4 runs, 3 of them finished" in second.stdout
    assert second.stdout.count("started") == second.stdout.count("done") == 1
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert third.stdout == "4 runs, 4 of them finished\n"
    for workdir in tmp_path.glob("*/"):
        assert [record["step"] for record in read_jsonl(workdir / "metrics.jsonl")] == list(range(1, 151))
