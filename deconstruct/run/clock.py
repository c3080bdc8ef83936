"""Where the wall-clock time of a run went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall-clock seconds by bucket (compile, data, step, checkpoint, ...), since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, bucket: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[bucket] = self._seconds.get(bucket, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """What was measured since the last call, rounded to milliseconds."""
        seconds, self._seconds = self._seconds, {}
        return {bucket: round(value, 3) for bucket, value in seconds.items()}
