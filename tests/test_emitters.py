"""Before jax 0.11 the tests run with XLA's older emitters, since they compile in half the time. A run has today's."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/attention/test_forms.py", "tests/model/test_stack.py"]


@pytest.mark.proof
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="all tests have today's emitters")
def test_todays_emitters_compute_the_same():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["DECONSTRUCT_EMITTERS"] = "today"
    command = [sys.executable, "-m", "pytest", "-m", "proof or not proof", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
