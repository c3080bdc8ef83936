"""Paths of this machine and of buckets (gs://, s3://), by etils.epath and fsspec: what the two leave to be said."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from deconstruct.types import UserError

# Scheme -> the library that fsspec reads it with, and the extra that installs it.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# They have errors of their own, beside OSError, for what a network may do.
_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")
_VERSIONS = ("ETag", "etag", "generation", "md5Hash")


class Stat(NamedTuple):
    """Bytes, and what changes when the content does: a time in nanoseconds, or a bucket's own mark."""

    size: int
    mark: str


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> epath.Path:
    """The path, with ~ expanded. Raises UserError for a scheme that cannot be read here."""
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(os.path.expanduser(text))
    file_system(text)
    return epath.Path(text)


def file_system(path: str) -> Any:
    """fsspec's file system of a path in a bucket. Raises UserError where it is of no known kind or not installed."""
    scheme = path.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{path}: unknown kind of address; expected {', '.join(f'{name}://' for name in SCHEMES)}")
    library, extra = SCHEMES[scheme]
    import fsspec

    for noisy in ("fsspec", library):  # what `reaching` says in a line they tell in tracebacks
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # A listing kept from before would hide what other processes have written since.
    for name in {scheme, extra}:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise UserError(f"{path}: needs {library}; pip install 'deconstruct[{extra}]'") from None


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one line what kept a path from being read or written: permissions, credentials, the network, space."""
    try:
        yield
    except OSError as error:
        where = path if error.filename is None or is_remote(path) else error.filename
        raise UserError(f"{where}: {error.strerror or _line(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _LIBRARIES:
            raise
        raise UserError(f"{path}: cannot be reached ({_line(error)})") from error


def stat(path: str | os.PathLike[str]) -> Stat:
    """Of a file. Raises FileNotFoundError where there is none."""
    text = os.fspath(path)
    if not is_remote(text):
        found = os.stat(text)
        return Stat(found.st_size, str(found.st_mtime_ns))
    return remote_stat(file_system(text).info(text))


def remote_stat(info: dict[str, Any]) -> Stat:
    """What fsspec says of an object."""
    mark = next((info[name] for name in _VERSIONS if info.get(name)), info.get("mtime"))
    return Stat(int(info["size"]), str(mark).strip('"'))


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is there whole, and on disk, or not at all."""
    target = place(path)
    if is_remote(path):
        target.write_bytes(data)  # an object appears when it is complete
        return
    unfinished = unfinished_name(target)
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        error.filename = os.fspath(target)  # not the name it has until then
        raise


def unfinished_name(path: str | os.PathLike[str]) -> Path:
    """Where a file of this machine is written until it is whole; another process has another name for it."""
    return Path(f"{os.fspath(path)}.unfinished-{os.uname().nodename}-{os.getpid()}")


def names_in(folder: epath.Path) -> set[str]:
    """The names of what stands in a folder; none where there is no such folder."""
    if not is_remote(folder):
        return set(os.listdir(folder)) if folder.is_dir() else set()
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def remove(files: Iterable[epath.Path]) -> None:
    """Deletes files that are there."""
    paths = list(files)
    if paths and is_remote(paths[0]):
        file_system(os.fspath(paths[0])).rm([os.fspath(path) for path in paths])
        return
    for path in paths:
        path.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
