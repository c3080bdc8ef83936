"""What the launchers' tests share: a small config file, prepared text, and the environment in which they start."""

import os
import sys
from pathlib import Path

import pytest

from tests.train.conftest import prepare_text

ROOT = Path(__file__).parents[2]
CONFIG = """
from deconstruct.config import default_config
from deconstruct.spelling import parse_argument


def get_config(argument=None):
    config = default_config()
    config.update(parse_argument(argument, {"variant": "standard"}))
    config.update({"sequence_length": 12, "batch_size": 8, "steps": 4, "log_every": 1, "checkpoint_every": 2})
    config.model.update({"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4})
    config.model.update({"dtype": "float32", "remat": False})
    config.optimizer.update({"warmup_steps": 1, "beta2": 0.99, "epsilon": 1e-4})
    config.mesh.update({"data": -1, "fsdp": 1})
    return config
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def data(folder):
    return prepare_text(folder / "text", 0)


@pytest.fixture(scope="session")
def environment():
    """One device a process; this checkout's `deconstruct`, by the name that users call it by."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT), "PATH": path}
