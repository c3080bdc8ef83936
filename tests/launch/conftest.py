"""What the launchers' tests share: prepared text, beside the small config file, and the environment they start in."""

import os
import sys
from pathlib import Path

import pytest

from tests.train.conftest import prepare_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(folder):
    return prepare_text(folder / "text", 0)


@pytest.fixture(scope="session")
def environment():
    """One device a process; this checkout's `deconstruct`, by the name that users call it by."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT), "PATH": path}
