"""How far prepare is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    """Shows units done of all there are, and documents and characters where they are counted. A context manager;
    writes to stderr."""

    def __init__(self, what: str, units: int):
        self._what, self._units = what, units
        self._begun = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(desc=self._what, total=self._units, unit=" units", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, units: int, documents: int, characters: int) -> None:
        """Says the totals so far, if it is time to."""
        now = time.monotonic()
        counted = (
            f"{documents:,} documents, {characters:,} characters, {characters / (now - self._begun):,.0f} a second"
        )
        if self._bar is not None:
            self._bar.n = units
            self._bar.set_postfix_str(counted if characters else "", refresh=True)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            line = f"{self._what}: {units} of {self._units} units" + (f", {counted}" if characters else "")
            print(line, file=sys.stderr, flush=True)
