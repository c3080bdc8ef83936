"""What saving costs: the memory of the host stays where it is, and the trainer does not wait until it is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABYTES, SAVES = 64, 40

# A trainer that updates its state, donated, while it is being saved. Prints an object a save: megabytes in use, seconds
# that `save` took, seconds until it was finished.
TRAINER = """
import json, sys, time
import jax, jax.numpy as jnp, psutil
from deconstruct.run.checkpoint import Checkpoints

folder, megabytes, saves = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shapes = {f"{i}": (megabytes, 1024 * 1024 // 32) for i in range(8)}
state = {name: jnp.full(shape, 1.0, jnp.float32) for name, shape in shapes.items()}
update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999 + 0.01, tree), donate_argnums=0)
with Checkpoints(folder, every=1, keep=2) as writer:
    for number in range(1, saves + 1):
        state = jax.block_until_ready(update(state))
        begun = time.perf_counter()
        writer.save(number, state, {"step": jnp.int32(number)}, {"step": number})
        blocked = time.perf_counter() - begun
        while number not in writer.steps:
            state = jax.block_until_ready(update(state))
            writer.check_errors()
        took = time.perf_counter() - begun
        used = psutil.Process().memory_info().rss / 1e6
        print(json.dumps({"megabytes": used, "blocked": blocked, "took": took}), flush=True)
"""


@pytest.mark.proof
def test_forty_saves_take_no_more_memory_and_are_not_waited_for(tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", TRAINER, str(tmp_path), str(MEGABYTES), str(SAVES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saves = [json.loads(line) for line in done.stdout.splitlines()]
    used = [save["megabytes"] for save in saves]
    blocked, took = (sum(save[name] for save in saves) / SAVES for name in ("blocked", "took"))
    with capsys.disabled():
        print(
            f"\n{SAVES} saves of {MEGABYTES} MB: {min(used[5:15]):.0f} to {max(used[5:15]):.0f} MB in use after the "
            f"first ones, {min(used[-10:]):.0f} to {max(used[-10:]):.0f} after the last; {took:.2f} s a save, "
            f"of which the trainer waits {blocked:.2f} s ({blocked / took:.0%})"
        )
    assert len(saves) == SAVES
    # The copy that was saved may or may not have gone when one looks.
    assert max(used[5:]) < min(used[5:]) + 2 * MEGABYTES
    assert min(used[-10:]) < min(used[5:15]) + MEGABYTES / 4
    # Of so small a state, on a CPU that takes the checksums as well; what is written to disk is not waited for.
    assert blocked < 0.75 * took
