"""What a run does when updates are not finite, checkpoints are damaged, or nothing goes on any more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.workdir import Workdir
from deconstruct.train.guard import WINDOW, judge, new_guard
from deconstruct.train.loop import train
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import make_state_spec
from deconstruct.train.step import batch_of, make_step
from tests.tiny import tiny_config
from tests.train.test_run import run_config

ROOT = Path(__file__).parents[2]


def test_an_update_that_is_not_finite_is_not_made():
    config = tiny_config({"num_layers": 1}, learning_rate=1e-2)
    optimizer = make_optimizer(config)
    spec = make_state_spec(config, optimizer, single_device_mesh())
    step = jax.jit(make_step(spec.graphdef, optimizer, make_schedule(config)))
    start = spec.init(None)
    batch = batch_of(jax.random.randint(jax.random.key(0), (8, 13), 0, config.model.vocab_size))
    poisoned = {**batch, "weights": batch["weights"].at[3, 5].set(jnp.inf)}

    state, metrics = step(start, poisoned)
    assert not np.isfinite(metrics["loss"]) and (metrics["skipped"], metrics["in_a_row"], state.step) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (start.params, start.opt_state))
    state, metrics = step(state, poisoned)
    assert (metrics["skipped"], metrics["in_a_row"]) == (2, 2)

    state, metrics = step(state, batch)
    straight, wanted = step(start, batch)  # as if nothing had been, the learning rate too
    assert (metrics["skipped"], metrics["in_a_row"], state.step) == (2, 0, 3)
    assert metrics["loss"] == wanted["loss"] and metrics["learning_rate"] == wanted["learning_rate"] > 0
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (straight.params, straight.opt_state))


def test_a_spike_is_known_once_there_is_something_to_compare_with():
    one = jnp.float32(1)
    guard = new_guard()
    for i in range(WINDOW):
        good, guard = judge(guard, one, one, jnp.float32(100 if i == 0 else 2), 5.0)
        assert good
    mean = (100 + 2 * (WINDOW - 1)) / WINDOW
    for norm, wanted in ((4.9 * mean, True), (5.1 * mean, False), (np.nan, False)):
        good, after = judge(guard, one, one, jnp.float32(norm), 5.0)
        assert bool(good) == wanted and after.in_a_row == (not wanted) and after.made == WINDOW + wanted
    _, after = judge(guard, one, one, jnp.float32(3), 5.0)
    assert after.norms[0] == 3 and after.norms[1] == 2  # the oldest has gone
    assert not judge(guard, one, one * jnp.inf, jnp.float32(2), 5.0)[0]


def strictly(text):
    """JSON, which has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.proof
def test_so_many_in_a_row_end_the_run_and_say_what_they_were(prepared, tmp_path):
    config = run_config(prepared, {"init_std": 1e18}, variant="standard", steps=20)
    message = r"step 8: 8 updates in a row were skipped \(loss .*norm nan\); .*skipped.jsonl has .*; there is no good"
    with pytest.raises(FloatingPointError, match=message):
        train(config, tmp_path)
    place = Workdir(tmp_path)
    assert finished_steps(place.checkpoints) == []
    skipped = strictly(place.skipped.read_text())
    assert [line["step"] for line in skipped] == list(range(1, 9))
    assert skipped[0]["grad_norm"] is None and len(skipped[0]["windows"]) == 8
    assert 0 <= skipped[0]["tokens_of_windows"]["least"] < skipped[0]["tokens_of_windows"]["most"]
    assert [line["grad_norm"] for line in strictly(place.metrics.read_text())] == [None] * 8


@pytest.mark.proof
def test_a_learning_rate_of_a_million_leaves_nothing_that_is_not_a_number(prepared, tmp_path):
    """The first update is made and useless, and what follows is not; a lower rate then begins anew in the workdir."""
    wild = run_config(prepared, variant="standard", steps=30, checkpoint_every=2, learning_rate=1e6)
    with pytest.raises(FloatingPointError, match=r"8 updates in a row were skipped .* there is no good one; a lower"):
        train(wild, tmp_path)
    place = Workdir(tmp_path)
    assert finished_steps(place.checkpoints) == [] and len(strictly(place.metrics.read_text())) >= 8
    assert train(run_config(prepared, variant="standard", steps=3, checkpoint_every=2), tmp_path) == 0
    assert finished_steps(place.checkpoints) == [2, 3]
    assert [line["skipped"] for line in strictly(place.metrics.read_text())] == [0, 0, 0]


@pytest.mark.proof
def test_a_checkpoint_from_which_no_update_can_be_made_is_set_aside(prepared, tmp_path):
    """Two good steps, then a learning rate that throws the parameters so far that the loss is no number."""
    good = run_config(prepared, variant="standard", steps=2, checkpoint_every=1)
    assert train(good, tmp_path) == 0
    wild = run_config(prepared, variant="standard", steps=20, checkpoint_every=1, learning_rate=1e25)
    message = r"the checkpoint of step 3, where it began, is set aside; the latest good one is of step 2; a lower"
    with pytest.raises(FloatingPointError, match=message):
        train(wild, tmp_path)
    place = Workdir(tmp_path)
    assert finished_steps(place.checkpoints) == [1, 2] and (place.checkpoints / "3.useless").exists()
    assert train(run_config(prepared, variant="standard", steps=4, checkpoint_every=1), tmp_path) == 0
    assert [line["step"] for line in strictly(place.metrics.read_text())] == [1, 2, 3, 4]


def start(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


WATCHED = """
import sys, time
from deconstruct.distributed.watchdog import Watchdog
def stuck_here():
    time.sleep(60)
with Watchdog(0.5, sys.argv[1]) as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.fed()
    print("fed")
    stuck_here()
"""


def test_the_watchdog_ends_what_is_stuck_and_says_where(tmp_path):
    process = start(WATCHED, tmp_path)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and out == "fed\n"
    (stacks,) = tmp_path.glob(f"stacks-*-{process.pid}.txt")
    assert err == f"watchdog: no step for 0.5 s; the stacks of all threads are in {stacks}\n"
    assert "stuck_here" in stacks.read_text()


STOPPED = """
import time
from deconstruct.distributed.stop import StopSignal
with StopSignal() as stop:
    print("ready")
    while not stop.reached(None):
        time.sleep(0.01)
    print("asked")
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ends(number):
    process = start(STOPPED)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"received {number.name}: stops after a step" in err and "received SIGTERM again: ends now" in err
