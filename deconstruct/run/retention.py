"""How checkpoints go: those that are retired, and what was never finished."""

from __future__ import annotations

import logging
import re

from etils import epath

META = "meta"
_UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder it has not finished
_log = logging.getLogger(__name__)


def meta_file(folder: epath.Path, step: int) -> epath.Path:
    """What says what a checkpoint holds: where it is, the checkpoint is finished."""
    return folder / str(step) / META / "data.json"


def remove_unfinished(folder: epath.Path) -> None:
    """Deletes what a writer that was killed has left."""
    for path in folder.iterdir() if folder.exists() else ():  # in a bucket an empty folder is none
        if re.fullmatch(r"\d+" + re.escape(_UNFINISHED) + ".*", path.name):
            delete(path)


def remove(folder: epath.Path, step: int) -> None:
    """Deletes a checkpoint so that at no moment, not even after a crash, a part of it looks finished."""
    path = folder / str(step)
    try:
        if "://" in str(folder):
            meta_file(folder, step).unlink()  # a bucket has no atomic rename; without this file it is not finished
        else:
            path = path.rename(folder / f"{step}{_UNFINISHED}-retired")
    except FileNotFoundError:
        return  # somebody was faster
    except OSError as error:
        _log.warning("the retired checkpoint %s could not be deleted: %s", path, error)
        return
    delete(path)


def delete(path: epath.Path) -> None:
    """Deletes a folder, or says that it could not be."""
    # A file that a reader holds open cannot be deleted on some file systems; that is no reason to end training.
    try:
        path.rmtree()
    except OSError as error:
        _log.warning("%s could not be deleted: %s", path, error)
