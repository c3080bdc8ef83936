"""launch/slurm.sh and sweeps under a real SLURM, which slurm_here.sh sets up on this machine."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.jsonl import read_jsonl
from tests.need import need_programs

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "launch" / "slurm_here.sh"
STEPS = 200  # enough that a signal finds them at work
pytestmark = pytest.mark.proof


class Cluster:
    """A SLURM, and a folder in which its jobs write their logs."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm" / "slurm.conf")}

    def run(self, *command):
        result = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def jobs(self):
        """Name of job -> its state, of those that have not ended."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, what, ready, limit=240):
        deadline = time.monotonic() + limit
        while not ready():
            assert time.monotonic() < deadline, f"never: {what}\n{self.logs()[-5000:]}"
            time.sleep(0.02)

    def until_done(self, requeued, limit=240):
        """Waits until no job is left. One that is back in the queue would wait there for two minutes, so that nodes
        have forgotten its first start: five seconds are enough for one node."""
        self.run("scontrol", "update", f"JobId={requeued}", "StartTime=now+5")
        self.wait("an empty queue", lambda: not self.jobs(), limit)

    def logs(self):
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))


@pytest.fixture
def cluster(tmp_path, environment):
    need_programs(*("munged", "slurmctld", "slurmd", "sbatch", "srun"), packages="munge slurmctld slurmd slurm-client")
    subprocess.run([HERE, "start", tmp_path / "slurm"], check=True)
    yield Cluster(tmp_path, environment)
    subprocess.run([HERE, "stop", tmp_path / "slurm"], check=True)


def trajectory(workdir):
    timing = ("tokens_per_second", "seconds", "mfu")
    return [{k: v for k, v in record.items() if k not in timing} for record in read_jsonl(workdir / "metrics.jsonl")]


def test_a_job_that_is_hit_by_term_saves_is_requeued_and_ends_as_if_nothing_had_been(cluster, folder, data, tmp_path):
    common = [f"--config={folder / 'tiny.py'}", f"--config.data={data}", f"--config.steps={STEPS}"]
    common += ["--config.checkpoint_every=1000"]
    local = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--"]
    cluster.run(*local, *common, f"--workdir={tmp_path / 'whole'}")

    run = tmp_path / "run"
    job = cluster.run("sbatch", "--parsable", "--ntasks=2", str(ROOT / "launch/slurm.sh"), *common, f"--workdir={run}")
    job = job.strip()
    cluster.wait("step 20", lambda: len(read_jsonl(run / "metrics.jsonl")) >= 20)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait("back in the queue", lambda: cluster.jobs().get(job) == "PENDING")
    (saved,) = finished_steps(run / "checkpoints")
    assert 20 <= saved < STEPS and len(read_jsonl(run / "metrics.jsonl")) == saved
    cluster.until_done(job)
    log = cluster.logs()
    assert "Exited with exit code 75" in log and "slurm.sh: saved; back into the queue" in log
    assert f"resuming from step {saved}" in log
    assert trajectory(run) == trajectory(tmp_path / "whole")
    assert len(trajectory(run)) == STEPS


def test_a_mistake_is_not_tried_again(cluster, folder, tmp_path):
    words = [f"--config={folder / 'tiny.py'}", "--config.data=nowhere", f"--workdir={tmp_path / 'run'}"]
    cluster.run("sbatch", "--ntasks=2", str(ROOT / "launch/slurm.sh"), *words)
    cluster.wait("an empty queue", lambda: not cluster.jobs())
    assert cluster.logs().count("nowhere: no prepared data here") == 2
    assert "back into the queue" not in cluster.logs()


def test_a_sweep_as_an_array_one_job_killed_and_repeated(cluster, folder, data, tmp_path):
    runs = tmp_path / "runs"
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), f"--config={folder / 'tiny.py'}"]
    command += [f"--workdir={runs}", "--over=variant=standard,mlp", "--over=config.seed=0,1", f"--config.data={data}"]
    command += [f"--config.steps={STEPS}", "--slurm=--ntasks=1", "--jobs=2"]
    submitted = cluster.run(*command)
    assert "4 runs, 0 of them finished" in submitted
    (array,) = re.findall(r"Submitted batch job (\d+)", submitted)
    victim = runs / "variant=mlp,seed=1"  # the fourth
    cluster.wait("step 5 of the victim", lambda: len(read_jsonl(victim / "metrics.jsonl")) >= 5)
    cluster.run("scancel", "--signal=KILL", f"{array}_4")
    cluster.wait("an empty queue", lambda: not cluster.jobs())
    assert not finished_steps(victim / "checkpoints") or finished_steps(victim / "checkpoints")[-1] < STEPS
    whole = trajectory(runs / "variant=mlp,seed=0")
    assert len(whole) == STEPS

    submitted = cluster.run(*command)
    assert "4 runs, 3 of them finished" in submitted
    (again,) = re.findall(r"Submitted batch job (\d+)", submitted)
    assert set(cluster.jobs()) == {f"{again}_4"}
    cluster.wait("an empty queue", lambda: not cluster.jobs())
    assert cluster.run(*command) == "4 runs, 4 of them finished\n"
    for name in ("variant=standard,seed=0", "variant=standard,seed=1", "variant=mlp,seed=0", "variant=mlp,seed=1"):
        assert [record["step"] for record in trajectory(runs / name)] == list(range(1, STEPS + 1))
    assert (tmp_path / f"deconstruct-{array}_1.log").exists()
