"""What a test may lack: it is skipped by name, but not by `make proof`, which has installed it."""

import importlib.util
import os

import pytest


def need(*modules, extra):
    """Skips the module that calls it where one of `modules` is not installed; fails where all was to be there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("DECONSTRUCT_PROOF"):
        raise ModuleNotFoundError(f"{', '.join(missing)} is missing; make proof installs the extra {extra}")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (extra {extra})", allow_module_level=True)
