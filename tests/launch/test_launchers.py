"""Each launcher's dry run, read by what would run it; and processes that `local` starts, stops and gives up."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deconstruct.run.jsonl import read_jsonl
from tests.need import need_programs

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
AWKWARD = "--config.variant=hidden/window(size=64)"
TRAIN = ["--config=configs/small.py", "--workdir=gs://bucket/run_A,b=1", AWKWARD, "--config.data=a 'b' $(c)"]
LAUNCHERS = ["local.py", "tpu.py", "gke.py", "skypilot.py"]
NEEDED = {
    "local.py": ["--processes=2", "--port=7911"],
    "tpu.py": ["--tpu=pod", "--zone=us-east5-b"],
    "gke.py": ["--image=here/it:1", "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--nodes=4"],
    "skypilot.py": ["--accelerators=H100:8", "--nodes=2"],
}
GPUS = ["--image=here/it:1", "--gpu=nvidia-h100-80gb", "--nodes=2"]


def launch(name, *words, **kwargs):
    command = [sys.executable, str(LAUNCH / name)] if name.endswith(".py") else [str(LAUNCH / name)]
    return subprocess.run([*command, *words], capture_output=True, text=True, **kwargs)


def dry_run(name, *words, train=TRAIN):
    result = launch(name, "--dry-run", *words, "--", *train)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def test_local_starts_each_process_with_its_place():
    lines = [shlex.split(line) for line in dry_run("local.py", *NEEDED["local.py"]).splitlines()]
    assert lines == [
        [
            f"JAX_LOCAL_DEVICE_IDS={i}",
            *("deconstruct", "train", *TRAIN),
            *("--coordinator=localhost:7911", "--num-processes=2", f"--process-id={i}"),
        ]
        for i in range(2)
    ]


def test_a_tpu_pod_runs_one_command_on_every_worker():
    command = shlex.split(dry_run("tpu.py", *NEEDED["tpu.py"], "--directory=my code", "--logs=out"))
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert command[6:-1] == ["--zone=us-east5-b", "--worker=all", "--output-directory=out"]
    key, _, remote = command[-1].partition("=")
    assert key == "--command"
    assert shlex.split(remote) == [
        *("cd", "my code", "&&", "exec", ".venv/bin/deconstruct", "train", "--distributed"),
        *TRAIN,
    ]


def test_a_slurm_job_starts_the_processes_with_srun():
    plain = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    common = ["srun", "--wait=60", "deconstruct", "train", "--distributed"]
    result = launch("slurm.sh", "--dry-run", "--process-per=gpu", *TRAIN, env=plain)
    assert shlex.split(result.stdout) == [*common, "--process-per=gpu", *TRAIN]
    inside = plain | {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    result = launch("slurm.sh", "--dry-run", *TRAIN, env=inside)
    assert shlex.split(result.stdout) == [*common, "--expect-devices=16", *TRAIN]


def test_a_job_of_an_array_takes_its_line(tmp_path):
    runs = tmp_path / "the runs.txt"
    runs.write_text("".join(shlex.join([*TRAIN, f"--config.seed={seed}"]) + "\n" for seed in range(3)))
    result = launch("slurm.sh", "--dry-run", f"--runs={runs}", env=os.environ | {"SLURM_ARRAY_TASK_ID": "2"})
    assert shlex.split(result.stdout)[5:] == [*TRAIN, "--config.seed=1"]


def test_a_name_from_the_workdir():
    for words in (["gke.py", *NEEDED["gke.py"]], ["skypilot.py", *NEEDED["skypilot.py"]]):
        assert "name: run-a-b-1\n" in dry_run(*words)
        assert "name: other\n" in dry_run(*words, "--name=other")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launchers_mistakes(name):
    for words, message in (
        ([*NEEDED[name], "--nonsense", "--", *TRAIN], "unrecognized arguments: --nonsense"),
        ([*NEEDED[name]], "expected -- and the arguments of deconstruct train"),
        (["--", *TRAIN], "the following arguments are required"),
    ):
        result = launch(name, "--dry-run", *words)
        assert result.returncode == 2 and message in result.stderr and not result.stdout
    result = launch(name, "--help")
    assert (
        result.returncode == 0 and "-- arguments of deconstruct train" in result.stdout and "--dry-run" in result.stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.py", "--processes=0"], "--processes=0: must be at least 1"),
        (["gke.py", "--image=i", "--nodes=1"], "expected --tpu=TYPE or --gpu=TYPE"),
        (["gke.py", "--image=i", "--nodes=1", "--tpu=t"], "--tpu: expected --topology, such as 4x4"),
        (["gke.py", *GPUS, "--slices=2"], "--gpu: --slices and --topology are a TPU's; leave them out"),
        (["gke.py", *GPUS, "--name=Run"], "--name=Run: expected lower-case letters"),
        (["skypilot.py", "--accelerators=H100:8", f"--name={'a' * 41}"], "40 at most"),
    ],
)
def test_options_that_cannot_be(words, message):
    result = launch(*words, "--", *TRAIN)
    assert result.returncode == 2 and message in result.stderr and not result.stdout


# Their own schemas and parsers: in an environment of its own, which `make proof` makes, for SkyPilot pins much.

TOOLS = Path(os.environ.get("DECONSTRUCT_LAUNCHERS", Path(sys.prefix) / "launchers"))

JOBSET_CHECK = """
import json, sys, yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
given = yaml.safe_load(sys.stdin)
read = JobsetV1alpha2JobSet.from_dict(given)
print(json.dumps([given, json.loads(json.dumps(read.to_dict(), default=str))]))
"""
SKYPILOT_CHECK = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps({"name": task.name, "nodes": task.num_nodes, "spot": resources.use_spot, "run": task.run,
    "accelerators": resources.accelerators, "recovery": resources.job_recovery, "setup": task.setup}))
"""


def in_tools(script, *words, **kwargs):
    python = TOOLS / "bin" / "python"
    if not python.exists() and os.environ.get("DECONSTRUCT_PROOF"):
        raise FileNotFoundError(f"{python} is missing; make proof makes it")
    if not python.exists():
        pytest.skip(f"{python} is missing; make proof makes it")
    result = subprocess.run([str(python), "-c", script, *words], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.proof
def test_the_job_set_fits_its_schema():
    """A word that the schema does not know would be dropped on reading, and missing when it is written again."""
    for words in (NEEDED["gke.py"], [*NEEDED["gke.py"], "--slices=2", "--restarts=3"], GPUS):
        yaml = dry_run("gke.py", *words)
        given, read = in_tools(JOBSET_CHECK, input=yaml)
        assert given == read
        (job,) = read["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"][:2] == ["deconstruct", "train"]
        assert container["command"][-len(TRAIN) :] == [word.replace("$(", "$$(") for word in TRAIN]
    assert "--coordinator=run-a-b-1-slice-0-0.run-a-b-1:8476" in container["command"]
    assert "--expect-devices=16" in container["command"]
    with pytest.raises(AssertionError):
        in_tools(JOBSET_CHECK, input=yaml.replace("backoffLimit: 0", "backoffLimit: none"))
    given, read = in_tools(JOBSET_CHECK, input=yaml.replace("maxRestarts", "maxRestart"))
    assert given != read


@pytest.mark.proof
def test_skypilot_reads_its_task(tmp_path):
    task = tmp_path / "task.yaml"
    task.write_text(dry_run("skypilot.py", *NEEDED["skypilot.py"]))
    read = in_tools(SKYPILOT_CHECK, str(task), cwd=ROOT)
    assert (read["name"], read["nodes"], read["spot"]) == ("run-a-b-1", 2, True)
    assert read["accelerators"] == {"H100": 8} and "[cuda12]" in read["setup"]
    assert read["recovery"]["recover_on_exit_codes"] == [75] and read["recovery"]["max_restarts_on_errors"] == 0
    command = shlex.split(read["run"])
    assert command[:2] == ["exec", "~/venv/bin/deconstruct"] and command[-len(TRAIN) :] == TRAIN
    task.write_text(task.read_text().replace("use_spot", "use_spots"))
    with pytest.raises(AssertionError, match="use_spots"):
        in_tools(SKYPILOT_CHECK, str(task), cwd=ROOT)


@pytest.mark.proof
def test_gcloud_knows_the_options_of_a_pod():
    """By its own help; no pod is asked for."""
    need_programs("gcloud", packages=None)
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    for option in ("--worker", "--output-directory", "--command", "--zone"):
        assert option in shown


# Real processes.


def local(environment, folder, data, workdir, *words, processes=2, **changes):
    return subprocess.Popen(
        [
            *(sys.executable, str(LAUNCH / "local.py"), f"--processes={processes}", "--"),
            *(f"--config={folder / 'tiny.py'}", f"--workdir={workdir}", f"--config.data={data}", *words),
        ],
        env=environment | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_local_ends_with_the_status_of_its_processes(environment, folder, data, tmp_path):
    process = local(environment, folder, "nowhere", tmp_path / "run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and out.count("nowhere: no prepared data here") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_local_passes_a_signal_on_and_the_run_goes_on(environment, folder, data, tmp_path):
    words = ("--config.steps=1500", "--config.checkpoint_every=1500")
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = local(environment, folder, data, tmp_path / "run", *words)
    deadline = time.monotonic() + 120
    while len(read_jsonl(metrics)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    saved = read_jsonl(metrics)[-1]["step"]
    process = local(environment, folder, data, tmp_path / "run", f"--config.steps={saved + 3}")
    assert process.wait(timeout=120) == 0
    assert [record["step"] for record in read_jsonl(metrics)] == list(range(1, saved + 4))


@pytest.mark.proof
def test_local_stops_the_others_when_one_dies(environment, folder, data, tmp_path):
    process = local(environment, folder, data, tmp_path / "run", "--config.steps=100000")
    deadline = time.monotonic() + 120
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    begun = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode in (1, 128 + signal.SIGKILL)  # whichever of them is seen first
    assert time.monotonic() - begun < 30
    assert not any(Path(f"/proc/{child}").exists() for child in children)
