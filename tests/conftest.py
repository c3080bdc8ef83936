"""Eight virtual CPU devices for every test, set before JAX starts; rank promotion raises."""

import atexit
import os
import shutil
import tempfile

from jaxlib import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling dominates these tests. LLVM's lowest level is several times faster, and leaves XLA's operations as they are;
# so do the emitters that XLA had before jax 0.11, at half the time. tests/test_emitters.py has those of today.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if version.__version_info__ < (0, 11) and os.environ.get("DECONSTRUCT_EMITTERS") != "today":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What takes long to compile and is wanted again, by a resumed run, a program that a test starts, or the other of
# pytest-xdist's workers, which inherit this. `make proof` compiles everything itself.
if "PYTEST_XDIST_WORKER" not in os.environ and "DECONSTRUCT_PROOF" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="deconstruct-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax
import pytest

from tests.tiny import CONFIG_FILE

jax.config.update("jax_numpy_rank_promotion", "raise")


# Begun first, that two workers end together: a file that takes long must not be the last.
FIRST = [
    f"tests/{name}" for name in ("compile", "train", "attention", "generation", "distributed", "kernels", "evaluate")
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a small config file, tiny.py, for programs that tests start."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "tiny.py").write_text(CONFIG_FILE)
    return folder
