"""Whole runs: what they write, and that stopping changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import portpicker
import pytest
from flax import nnx

from deconstruct.lock import alone_in
from deconstruct.run import checkpoint
from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.status import status
from deconstruct.run.workdir import Workdir
from deconstruct.train.loop import train
from deconstruct.train.resume import check_same_run, make_meta
from deconstruct.types import UserError
from tests.tiny import tiny_config

STEPS = 12
ROOT = Path(__file__).parents[2]


def run_config(data, model=None, **top):
    settings = {"variant": "fixed_seq_qk", "layout": "even", "steps": STEPS, "checkpoint_every": 3}
    settings["learning_rate"] = 1e-2
    optimizer = {"schedule_steps": 20}
    return tiny_config(
        {"vocab_size": 0, "num_layers": 4, **(model or {})}, data=str(data), optimizer=optimizer, **{**settings, **top}
    )


def trajectory(workdir):
    """What must not depend on how often a run was stopped: all that is logged but the time it took."""
    timing = ("tokens_per_second", "seconds", "mfu")
    records = read_jsonl(Workdir(workdir).metrics)
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared):
    """An uninterrupted run, across two ends of the epoch."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(run_config(prepared), workdir) == 0
    return workdir


def test_what_a_run_writes(whole, prepared):
    place = Workdir(whole)
    records = read_jsonl(place.metrics)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds"} <= set(records[0])
    assert {"compile", "data", "step"} <= set(records[0]["seconds"])
    assert records[0]["tokens"] == 8 * 12
    assert records[-1]["loss"] < records[0]["loss"]
    assert finished_steps(place.checkpoints) == [6, 9, 12]  # the last three
    assert place.read_config() == run_config(prepared)
    assert (place.tokenizer / "tokenizer.model").exists()
    assert list((whole / "tensorboard").iterdir())
    meta = checkpoint.read_meta(place.checkpoints, 12)
    assert meta["data"]["position"] == 12 * 8 and meta["layout"] == ["fixed_seq_qk", "standard"] * 2


@pytest.mark.parametrize("steps", [STEPS, STEPS - 3])
def test_running_again_when_done_changes_nothing(whole, prepared, steps):
    files = [Workdir(whole).metrics, Workdir(whole).sessions, Workdir(whole).config_file]
    before = [file.read_text() for file in files]
    assert train(run_config(prepared, steps=steps), whole) == 0
    assert [file.read_text() for file in files] == before


def test_the_sessions_of_a_run(whole):
    events = read_jsonl(Workdir(whole).sessions)
    assert [event["event"] for event in events] == ["start", "begin", *["save"] * 4, "end"]
    assert [event["step"] for event in events[1:]] == [0, 3, 6, 9, 12, 12]
    seen = status(Workdir(whole), "whole")
    assert (seen.state, seen.step, seen.checkpoint, seen.damaged) == ("done", STEPS, STEPS, ())
    assert seen.checkpoint == finished_steps(Workdir(whole).checkpoints)[-1]
    spent = seen.goodput
    assert (spent.sessions, spent.lost_steps) == (1, 0) and spent.seconds["lost"] == 0
    assert sum(spent.seconds.values()) == pytest.approx(spent.wall)
    logged = [record["seconds"] for record in read_jsonl(Workdir(whole).metrics)]
    # What was measured after the last line was written, that line does not have.
    assert 0.9 * sum(s.get("step", 0) for s in logged) <= spent.seconds["steps"] <= spent.wall
    assert not (whole / ".lock.json").exists()


def test_a_second_trainer_is_refused_and_told_who_is_at_work(whole, prepared):
    refused = pytest.raises(UserError, match=rf"another train is writing here: host .*, process {os.getpid()}, since")
    with alone_in(whole, "--workdir", "train"), refused:
        train(run_config(prepared, steps=STEPS + 1), whole)
    assert Workdir(whole).read_config().steps == STEPS


@pytest.mark.parametrize("stop", [3, pytest.param(6, marks=pytest.mark.proof)])
def test_stopping_and_resuming_is_the_same_run(whole, prepared, tmp_path, stop):
    assert train(run_config(prepared, steps=stop), tmp_path) == 0
    assert train(run_config(prepared), tmp_path) == 0
    assert trajectory(tmp_path) == trajectory(whole)
    jax.tree.map(np.testing.assert_array_equal, *(saved(place) for place in (tmp_path, whole)))


def saved(workdir):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(restore_model(workdir)))]


def test_the_plan_may_change_between_writing_and_reading(whole, prepared, tmp_path):
    tokens = np.arange(10)[None] % 40
    scanned, unrolled = restore_model(whole), restore_model(whole, scan=False)
    assert (len(scanned.config.plan[0].unit), len(unrolled.config.plan[0].unit)) == (2, 4)
    np.testing.assert_allclose(scanned(tokens), unrolled(tokens), atol=1e-6)  # float32 rounding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"config.seed=1, but this workdir holds a run with 0"),
        ({"batch_size": 16}, r"config.batch_size=16, but .* with 8"),
        ({"layout": "odd"}, r"config.layout=standard,fixed_seq_qk,.* but .* fixed_seq_qk,standard"),
        ({"model": {"intermediate_size": 32}}, r"config.model.intermediate_size=32, but .* with 24"),
        ({"model": {"head_dim": 8}}, r"config.model.head_dim=8, but .* with 4"),
    ],
)
def test_another_run_is_refused_by_naming_the_difference(whole, prepared, change, message):
    with pytest.raises(UserError, match=message):
        train(run_config(prepared, **change), whole)


def test_what_zero_stands_for_may_be_spelled_out():
    """0 key heads are as many as heads, 0 of a head's width is hidden_size / num_heads: 16 / 4."""
    plain, explicit = tiny_config(), tiny_config({"num_kv_heads": 4, "head_dim": 4})
    for saved, now in ((plain, explicit), (explicit, plain)):
        check_same_run(now, make_meta(saved, 3, "data", "tokenizer"), "data", "tokenizer")
    old = plain.to_dict()
    del old["model"]["head_dim"]  # a run from before there was such a key
    check_same_run(explicit, make_meta(plain, 3, "data", "tokenizer") | {"config": old}, "data", "tokenizer")
    with pytest.raises(UserError, match=r"config.model.num_kv_heads=2, but this workdir holds a run with 4"):
        check_same_run(tiny_config({"num_kv_heads": 2}), make_meta(plain, 3, "d", "t"), "d", "t")


def test_other_data_is_refused(whole, other_prepared):
    with pytest.raises(UserError, match=r"config.data=.*its (tokenizer|fingerprint) is .*the checkpoint was trained"):
        train(run_config(other_prepared), whole)


def flip(folder):
    """One bit of an array: Orbax keeps a second copy of small ones, which is not read."""
    path = max((folder / "train" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.proof
def test_a_damaged_checkpoint_is_set_aside_and_the_run_is_the_same(whole, prepared, tmp_path, caplog):
    run = shutil.copytree(whole, tmp_path / "run")
    flip(run / "checkpoints" / "12")
    (run / "checkpoints" / "9" / "meta" / "data.json").write_text("{}")
    with caplog.at_level("WARNING"):
        assert train(run_config(prepared, steps=13), run) == 0
    assert "12 is damaged: " in caplog.text and "; the one before is step 9" in caplog.text
    assert "9 is damaged: meta/data.json does not speak of step 9; the one before is step 6" in caplog.text
    assert "12 is set aside as 12.damaged; going on from step 6" in caplog.text
    assert finished_steps(run / "checkpoints") == [9, 12, 13]
    assert trajectory(run)[:12] == trajectory(whole)
    for step in (9, 12, 13):
        (run / "checkpoints" / str(step) / "meta" / "data.json").write_text("null")
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"9 is damaged: .*; there is none before it"):
        train(run_config(prepared), run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_a_missing_fixed_text_is_named(prepared, tmp_path):
    with pytest.raises(UserError, match=r"config.model.fixed_text=nowhere.txt: there is no such file"):
        train(run_config(prepared, {"fixed_text": "nowhere.txt"}), tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("fog")
    with pytest.raises(UserError, match=r"short.txt: \d+ tokens, but the fixed stream has model.fixed_length=12"):
        train(run_config(prepared, {"fixed_text": str(short)}), tmp_path / "run")


# Real processes, killed for real.

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
if len(sys.argv) > 4:
    jax.distributed.initialize(f"localhost:{{sys.argv[4]}}", int(sys.argv[5]), int(sys.argv[6]))
import json
from deconstruct.cli import main
from deconstruct.config import Config
from deconstruct.train.loop import train
sys.exit(train(Config.from_dict(json.load(open(sys.argv[1]))), sys.argv[2]))
"""


class Launch:
    """Starts runs of one configuration in processes of their own."""

    def __init__(self, folder, config):
        self.config, self.script, self.log = folder / "config.json", folder / "run.py", folder / "log.txt"
        folder.mkdir(exist_ok=True)
        self.config.write_text(json.dumps(config.to_dict()))
        self.script.write_text(SCRIPT.format(root=str(ROOT)))

    def start(self, workdir, devices=2, cluster=()):
        command = [sys.executable, str(self.script), str(self.config), str(workdir), str(devices), *map(str, cluster)]
        environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
        return subprocess.Popen(command, stdout=self.log.open("a"), stderr=subprocess.STDOUT, env=environment)

    def finish(self, *processes, status=0):
        for process in processes:
            assert process.wait(timeout=400) == status, self.log.read_text()


def kill_when(process, ready, what, limit=120):
    deadline = time.monotonic() + limit
    while not ready():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.proof
def test_killed_in_an_epoch_and_in_a_save_the_metrics_are_those_of_an_uninterrupted_run(prepared, tmp_path):
    config = run_config(prepared, steps=60, accumulation=2, checkpoint_every=4, mesh={"data": 2, "fsdp": 1})
    launch = Launch(tmp_path / "launch", config)
    launch.finish(launch.start(tmp_path / "whole"))

    broken = tmp_path / "broken"
    logged = lambda: len(read_jsonl(Workdir(broken).metrics))  # noqa: E731
    kill_when(launch.start(broken), lambda: logged() >= 6, "step 6")
    seen = logged()
    unfinished = lambda: list((broken / "checkpoints").glob("*.orbax-checkpoint-tmp")) and logged() > seen  # noqa: E731
    kill_when(launch.start(broken), unfinished, "a save under way")
    assert 60 not in finished_steps(broken / "checkpoints")
    launch.finish(launch.start(broken))
    assert trajectory(broken) == trajectory(tmp_path / "whole")


@pytest.mark.proof
def test_the_number_of_hosts_may_change(prepared, tmp_path):
    """Half a run by one process of two devices, the rest by two processes of one: the metrics of one process alone."""
    config = run_config(prepared, mesh={"data": 2, "fsdp": 1})
    launch = Launch(tmp_path / "launch", config)
    launch.finish(launch.start(tmp_path / "alone"))

    half = Launch(tmp_path / "half", config.replace(steps=6))
    half.finish(half.start(tmp_path / "shared"))
    port = portpicker.pick_unused_port()
    launch.finish(*(launch.start(tmp_path / "shared", 1, (port, 2, i)) for i in range(2)))
    assert trajectory(tmp_path / "shared") == trajectory(tmp_path / "alone")


@pytest.mark.proof
def test_sigterm_saves_and_says_try_again(prepared, tmp_path):
    config = run_config(prepared, steps=100_000, checkpoint_every=100_000)
    launch = Launch(tmp_path / "launch", config)
    process = launch.start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while len(read_jsonl(Workdir(tmp_path / "run").metrics)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, launch.log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    launch.finish(process, status=75)
    step = finished_steps(tmp_path / "run" / "checkpoints")[-1]
    assert step == read_jsonl(Workdir(tmp_path / "run").metrics)[-1]["step"]
