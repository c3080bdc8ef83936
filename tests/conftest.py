"""Eight virtual CPU devices for every test, set before JAX starts; rank promotion raises."""

import os

from jaxlib import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling dominates these tests. LLVM's lowest level is several times faster, and leaves XLA's operations as they are;
# so do the emitters that XLA had before jax 0.11, at half the time. tests/test_emitters.py has those of today.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if version.__version_info__ < (0, 11) and os.environ.get("DECONSTRUCT_EMITTERS") != "today":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from tests.tiny import CONFIG_FILE

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a small config file, tiny.py, for programs that tests start."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "tiny.py").write_text(CONFIG_FILE)
    return folder
