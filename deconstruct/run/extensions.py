"""The code of a run that is not the package's: kept with it, and never run unasked when the run is opened again."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from deconstruct.attention.extensions import files_of, load_extension
from deconstruct.attention.registry import loaded_code
from deconstruct.config import Config
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


class Trust(NamedTuple):
    """What code may be run to open a workdir: files of the user's own, or (`all_found`) those kept in the workdir."""

    files: tuple[str, ...] = ()
    all_found: bool = False


NOTHING = Trust()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("code of the run (where its config named extensions)")
    group.add_argument(
        "--extension", action="append", default=[], metavar="FILE", help="your own copy of such a file; repeatable"
    )
    group.add_argument("--allow-extensions", action="store_true", help="run the copies that are kept in the workdir")


def trust(arguments: argparse.Namespace) -> Trust:
    """What the options of `add_arguments` say."""
    return Trust(tuple(arguments.extension), arguments.allow_extensions)


def keep(run_dir: Workdir, layers: Sequence[str]) -> None:
    """Copies the files that define the layers into the workdir."""
    files = files_of(tuple(layers))
    if files:
        run_dir.extensions.mkdir(parents=True, exist_ok=True)
    for entry, path in files.items():
        (run_dir.extensions / entry.partition(":")[0]).write_bytes(path.read_bytes())


def load(run_dir: Workdir, config: Config, trusted: Trust) -> None:
    """Makes the names of a run known. Raises UserError where its code is not trusted, not there, or another by now."""
    given = {_sha256_of_file(path): path for path in trusted.files}
    for entry in config.code:
        name, _, sha256 = entry.partition(":")
        if sha256 in given:
            load_extension(given.pop(sha256), "--extension")
        elif sha256 in loaded_code():
            continue
        elif given:
            others = ", ".join(f"{path} has {own[:12]}" for own, path in given.items())
            raise UserError(f"--extension: this run was trained with a {name} of sha256 {sha256[:12]}; {others}")
        elif trusted.all_found:
            _load_kept(run_dir, name, sha256)
        else:
            raise UserError(
                f"{run_dir.folder}: this run needs {name} (sha256 {sha256[:12]}), code that is not part of deconstruct "
                f"and is not run unasked; --extension=FILE names your own copy, --allow-extensions runs the one in "
                f"{run_dir.extensions}"
            )
    if given:
        path = next(iter(given.values()))
        raise UserError(f"--extension={path}: this run needs no such file; leave it out")


def _load_kept(run_dir: Workdir, name: str, sha256: str) -> None:
    kept = run_dir.extensions / name
    if not kept.exists():
        raise UserError(f"{kept}: this file of the run is missing; --extension=FILE names your own copy")
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{kept}: changed since the run was trained (sha256 {found[:12]}, then {sha256[:12]}); not run")
    load_extension(str(kept), "--allow-extensions")


def _sha256_of_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        raise UserError(f"--extension={path}: there is no such file") from None
