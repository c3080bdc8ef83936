"""What a test may lack: it is skipped by name, but not by `make proof`, which has installed it."""

import importlib.util
import os
import shutil

import pytest


def need(*modules, extra):
    """Skips the module that calls it where one of `modules` is not installed; fails where all was to be there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("DECONSTRUCT_PROOF"):
        raise ModuleNotFoundError(f"{', '.join(missing)} is missing; make proof installs the extra {extra}")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (extra {extra})", allow_module_level=True)


def need_programs(*names, packages):
    """Skips where a program is missing that nothing here can install; fails in `make proof` where it was to install
    Debian's `packages`, as root."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [name for name in names if shutil.which(name, path=path) is None]
    installable = packages and os.geteuid() == 0 and shutil.which("apt-get")
    if missing and installable and os.environ.get("DECONSTRUCT_PROOF"):
        raise FileNotFoundError(f"{', '.join(missing)} missing; make proof installs {packages} with apt-get")
    if missing:
        how = f"; apt-get install {packages}, as root" if packages else ""
        pytest.skip(f"{' and '.join(missing)} not installed{how}")
