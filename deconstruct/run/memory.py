"""The memory of the host."""

from __future__ import annotations

import contextlib
import ctypes


def hand_back() -> None:
    """Gives what was freed back to the system. The C library keeps it for later, in pieces that the next copy of a
    state does not always fit: without this a process that saves grows by the half over forty saves."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
