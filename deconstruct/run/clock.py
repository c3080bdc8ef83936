"""Where the wall-clock time of a run went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall-clock seconds by bucket (compile, data, step, checkpoint, ...), since the last `take` and in all.

    `started` is when the clock was made, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self._seconds: dict[str, float] = {}
        self._total: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, bucket: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            for seconds in (self._seconds, self._total):
                seconds[bucket] = seconds.get(bucket, 0.0) + spent

    def take(self) -> dict[str, float]:
        """What was measured since the last call, rounded to milliseconds."""
        seconds, self._seconds = self._seconds, {}
        return _rounded(seconds)

    def total(self) -> dict[str, float]:
        """All that was ever measured, rounded likewise."""
        return _rounded(self._total)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {bucket: round(value, 3) for bucket, value in seconds.items()}
