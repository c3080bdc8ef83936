"""How far prepare is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

LINE_SECONDS = 10.0
POLL_SECONDS = 0.25


class Progress:
    """Shows characters and documents done. A context manager; writes to stderr."""

    def __init__(self, what: str):
        self._what = what
        self._begun = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(desc=self._what, unit=" characters", unit_scale=True, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, documents: int, characters: int) -> None:
        """Says the totals so far, if it is time to."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.n = characters
            self._bar.set_postfix(documents=documents, refresh=True)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            rate = characters / (now - self._begun)
            line = f"{self._what}: {documents:,} documents, {characters:,} characters, {rate:,.0f} characters/s"
            print(line, file=sys.stderr, flush=True)


def take_all(
    waiting: set[Future], what: str, done: Callable[[], tuple[int, int]], take: Callable[[Any], object]
) -> None:
    """Hands each result to `take` as it comes and forgets it, showing `done()` (documents, characters) meanwhile."""
    with Progress(what) as progress:
        while waiting:
            finished, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            waiting -= finished
            while finished:
                take(finished.pop().result())
            progress.show(*done())
