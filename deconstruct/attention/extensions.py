"""A user's own files: Python that registers forms, mixers or sources, known by the sha256 of what it says."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from deconstruct.attention.registry import in_package, origin
from deconstruct.attention.variants import find_variant
from deconstruct.types import UserError

_loaded: set[tuple[Path, str]] = set()


def load_extension(path: str | Path, asked_by: str) -> str:
    """Runs a file, so that what it registers is known; once for what it says. Returns its sha256.

    `asked_by` is the key or option that names it, for the message. Raises UserError where the file is not there or
    fails. It may import what lies beside it.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{asked_by}={path}: there is no such file")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if (file, sha256) in _loaded:
        return sha256
    name = f"deconstruct_extension_{sha256[:12]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{asked_by}={path}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is a program: it may fail in any way
        del sys.modules[name]
        if isinstance(error, UserError):
            raise UserError(f"{asked_by}={path}: {error}") from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(f"{asked_by}={path}: {type(error).__name__}: {error}{where}") from error
    finally:
        sys.path.remove(str(file.parent))
    _loaded.add((file, sha256))
    return sha256


def code_of(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The files outside the package that define what the layers are made of, each NAME:SHA256.

    A class that no file defines (a notebook's) is left out; see `without_file`.
    """
    found = (origin(cls) for name in dict.fromkeys(layers) for cls in find_variant(name).classes)
    return tuple(sorted({f"{known.path.name}:{known.sha256}" for known in found if known is not None}))


def files_of(layers: tuple[str, ...]) -> dict[str, Path]:
    """The same files: NAME:SHA256 -> where it was when it was run."""
    found = (origin(cls) for name in dict.fromkeys(layers) for cls in find_variant(name).classes)
    return {f"{known.path.name}:{known.sha256}": known.path for known in found if known is not None}


def without_file(layers: tuple[str, ...]) -> str | None:
    """The first layer whose class no file defines, so that no other process can run it; None where there is none."""
    for name in dict.fromkeys(layers):
        if any(origin(cls) is None and not in_package(cls) for cls in find_variant(name).classes):
            return name
    return None
