"""Which files an input is: one, a folder of them, those that match a glob, here or in a bucket; or Python's own."""

from __future__ import annotations

import glob
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple, NoReturn

from deconstruct.paths import Stat, file_system, is_remote, reaching, remote_stat, stat
from deconstruct.types import UserError

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".jsonl.zst": "jsonl.zst", ".parquet": "parquet"}
SUFFIXES = ", ".join(KINDS)
HUB = "hub:"
# Of the standard library: tests and generated or installed files are not its source text.
NOT_SOURCES = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


class File(NamedTuple):
    """A file of text, here or in a bucket, and what was found there when it was listed."""

    path: str
    stat: Stat


def files_of(given: str) -> list[File]:
    """The files of text that a path names: itself, those of a folder, or those that match a glob; sorted.

    Raises UserError where there is none.
    """
    if is_remote(given):
        with reaching(given):
            return _remote_files(given)
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return _here([str(path / p) for p in found if _is_text(p)] or _nothing_in(given))
    if path.is_file():
        return _here([str(path)] if kind_of(given) else _unknown_kind(given))
    if glob.has_magic(given):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p) and kind_of(p))
        return _here(found or _no_match(given))
    raise UserError(f"--input={given}: no such file or folder; give a file, a folder, a glob or {HUB}NAME")


def _remote_files(given: str) -> list[File]:
    """As `files_of`, in a bucket: one listing says all there is to know of a folder."""
    files, scheme = file_system(given), given.partition("://")[0]
    root = files._strip_protocol(given)
    if glob.has_magic(given):
        found = {p: info for p, info in files.glob(root, detail=True).items() if info["type"] == "file" and kind_of(p)}
        found = found or _no_match(given)
    elif files.isfile(root):
        found = {root: files.info(root)} if kind_of(given) else _unknown_kind(given)
    else:
        found = files.find(root, detail=True)
        if not found:
            raise UserError(f"--input={given}: no such file or folder; give a file, a folder or a glob")
        found = {p: info for p, info in found.items() if _is_text(p[len(root) :].strip("/"))} or _nothing_in(given)
    return [File(f"{scheme}://{path}", remote_stat(found[path])) for path in sorted(found)]


def _here(paths: list[str]) -> list[File]:
    return [File(path, stat(path)) for path in paths]


def _is_text(path: str) -> bool:
    """Of a path below a folder that was given."""
    return kind_of(path) is not None and not any(part.startswith(".") for part in path.split("/"))


def _nothing_in(given: str) -> NoReturn:
    raise UserError(f"--input={given}: no text in this folder; it should hold files ending in {SUFFIXES}")


def _unknown_kind(given: str) -> NoReturn:
    raise UserError(f"--input={given}: unknown kind of file; its name should end in one of {SUFFIXES}")


def _no_match(given: str) -> NoReturn:
    raise UserError(f"--input={given}: no file matches; a match should end in one of {SUFFIXES}")


def kind_of(path: str) -> str | None:
    """A value of KINDS; None for another kind of file."""
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def standard_library() -> list[File]:
    """Python's own sources."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    kept = [name for name in names if not NOT_SOURCES & set(name.split("/")) and not name.startswith(("_sysc", "conf"))]
    if not kept:
        raise UserError(f"--input: Python's own sources are not in {root}; give --input=PATH")
    return _here([str(root / name) for name in kept])
