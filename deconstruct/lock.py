"""One writer to a folder: a lock that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deconstruct.types import UserError


@contextmanager
def alone_in(folder: Path, option: str, verb: str) -> Iterator[None]:
    """Holds the lock of a folder that is there. Raises UserError where another process has it."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{option}={folder}: another {verb} is writing here; wait for it to end") from None
        yield
