"""The GPU kernels through ptxas, for an H100 that is not here. Run by `make proof`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.need import need

pytestmark = pytest.mark.proof

# As in tests/compile: `make proof` keeps the compilers in an environment of their own.
PYTHON = os.environ.get("DECONSTRUCT_AOT", sys.executable)
if sys.executable == PYTHON:
    need("jax_cuda12_plugin", extra="aot-cuda")

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 232_448  # bytes that one block may have on an H100
PAIRWISE = ["pairwise_forward", "pairwise_key_gradients", "pairwise_query_gradients"]
SELF_GATE = ["mean_gradients", "running_mean"]
WALK = ["chunk_states"] * 2  # from the first chunk to the last, and for gradients back


@pytest.mark.parametrize(
    ("path", "dim", "kernels"),
    [
        ("taylor", 64, PAIRWISE),
        ("taylor", 128, PAIRWISE),
        ("taylor_shared", 64, PAIRWISE),
        ("softmax_shared", 128, PAIRWISE),
        ("self_gate", 128, SELF_GATE),
        ("plain_walk", 64, WALK),
        ("corrected_walk", 64, WALK),
        ("corrected_walk", 128, WALK),
    ],
)
def test_an_h100_takes_the_kernels(path, dim, kernels, record_property):
    command = [PYTHON, str(Path(__file__).with_name("compiling.py")), path, str(dim)]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    record_property("kernels", found)
    print(*found, sep="\n")
    assert sorted(record["kernel"].strip("_") for record in found) == kernels
    for record in found:
        assert record["architecture"] == "sm_90a" and record["spilled"] == 0
        assert record["registers"] <= 255 and record["shared_memory"] <= SHARED_MEMORY
