"""Real compilers for devices that are not here: TPUs by libtpu, H100s by XLA and ptxas. Run by `make proof`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from deconstruct.attention.registry import FORMS
from tests.need import need
from tests.tiny import tiny_config

pytestmark = pytest.mark.proof

# `make proof` keeps the compilers in an environment of their own, where they cannot get in anything else's way.
PYTHON = os.environ.get("DECONSTRUCT_AOT", sys.executable)
if sys.executable == PYTHON:
    need("libtpu", "jax_cuda12_plugin", extra="aot-tpu,aot-cuda")

ROOT = Path(__file__).parents[2]
CONFIG = """
from deconstruct.config import default_config
from deconstruct.spelling import parse_argument

def get_config(argument=None):
    config = default_config()
    config.update(parse_argument(argument, {"variant": "standard", "layout": "uniform"}))
    config.update({"data": "", "batch_size": 16, "sequence_length": 256})
    config.mesh.tensor = 2
    config.model.update({"hidden_size": 128, "intermediate_size": 256, "num_layers": 4, "num_heads": 4, "head_dim": 64})
    config.model.vocab_size = 1000
    return config
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return str(tmp_path / "tiny.py")


def kernels_of(name):
    config = tiny_config({"dtype": "bfloat16"}, variant=f"hidden/{name}").model
    return FORMS[name](config, nnx.Rngs(0)).kernels()


def compiled(config, *words):
    """The status, the records, and the last line of stderr."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [PYTHON, "-m", "deconstruct.cli", "compile", f"--config={config}", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=900)
    return done.returncode, [*map(json.loads, done.stdout.splitlines())], (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("topology", "device", "variant"),
    [
        ("v5e:2x4", "TPU v5 lite", "rnd_emb_qk"),
        ("v5e:2x4", "TPU v5 lite", "hidden/gated_delta"),
        ("h100:1x1x8", "NVIDIA H100 80GB HBM3", "rnd_emb_qk"),
        ("h100:1x1x8", "NVIDIA H100 80GB HBM3", "approximate"),
    ],
)
def test_three_programs(config, topology, device, variant):
    """With the kernels in the train step, which are divided over batch and heads."""
    status, records, _ = compiled(f"{config}:variant={variant}", f"--topology={topology}")
    assert status == 0 and [record["program"] for record in records] == ["train", "evaluate", "decode"]
    for record in records:
        assert record["fits"] and record["device"] == device and record["devices"] == 8
        assert record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
        assert 0 < record["bytes"]["arguments"] < record["bytes"]["peak"] < 1e8
    train = records[0]
    assert train["flops"] > 1e9 and train["seconds"]["compile"] > 0 and train["kernels"]
    # Parameters of four layers are gathered for the forward and again for the backward pass; gradients are summed to
    # where they lie, at once or from one neighbour to the next (libtpu of jax 0.12).
    collectives = train["collectives"]
    summed = [collectives[kind]["times"] for kind in ("reduce-scatter", "collective-permute") if kind in collectives]
    assert collectives["all-gather"]["bytes"] > 1e6 and sum(summed) >= 4


def test_slices_are_joined_by_data(config):
    status, (record,), _ = compiled(config, "--topology=v5e:2x2", "--slices=2", "--programs=train")
    assert status == 0 and record["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}


def test_what_does_not_fit_a_chip(config):
    words = ("--topology=v5e:2x2", "--programs=train", "--config.batch_size=512", "--config.sequence_length=8192")
    status, (record,), said = compiled(config, *words, "--config.model.remat=false")
    assert status == 2 and not record["fits"] and "hbm" in record["reason"].lower()
    assert said == f"deconstruct compile: train: {record['reason']}"


def test_a_shape_that_no_slice_has(config):
    status, records, said = compiled(config, "--topology=v5e:3x5")
    assert status == 2 and not records
    assert said.startswith("deconstruct compile: --topology=v5e:3x5: INVALID_ARGUMENT: Topology layout")


@pytest.mark.parametrize(
    ("topology", "length", "dtype"),
    [("v5e:2x2", 8192, "bfloat16"), ("v5p:2x2x1", 1024, "float32"), ("v6e:2x2", 512, "bfloat16")],
)
def test_kernels_of_every_form(config, topology, length, dtype):
    """Forward and backward, by libtpu's own compiler, maps for 16 sequences of a device too. Over long sequences taylor
    is a walk, over short ones a map."""
    of_tpus = [name for name in FORMS if "pallas_tpu" in kernels_of(name)]
    names = ["fixed_random/softmax", *(f"hidden/{name}" for name in of_tpus)]
    words = [f"--config.layout={','.join(names)}", f"--config.model.num_layers={len(names)}"]
    words += [f"--config.sequence_length={length}", "--config.model.head_dim=64", "--config.mesh.tensor=1"]
    words += [f"--config.model.dtype={dtype}", "--config.batch_size=64"]
    status, (record,), _ = compiled(config, f"--topology={topology}", "--programs=mix", *words)
    assert status == 0 and record["fits"]
    walks = ["self_gate", "gated_linear", "gated_delta", *(["taylor"] if length > 4300 else [])]
    found = record["kernels"]
    assert found["walk_forward"] == found["walk_backward"] == len(walks)
    assert sum(times for name, times in found.items() if "forward" in name or "fwd" in name) == len(names)
