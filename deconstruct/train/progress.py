"""How far a run is: a bar on a terminal, elsewhere lines that are logged, which a notebook sees only if it asks."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from deconstruct.distributed import runtime
from deconstruct.duration import clock

log = logging.getLogger(__name__)


class Progress:
    """Shows loss, tokens/s, MFU and the time left, on process 0."""

    def __init__(self, first: int, steps: int):
        self._first, self._steps, self._started = first, steps, time.perf_counter()
        self._speaks = runtime.is_main()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=first, unit="step", disable=not (self._speaks and terminal))
        self._lines = self._speaks and not terminal

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def report(self, step: int, record: dict[str, Any]) -> None:
        """Shows a logged record."""
        what = f"{record['stage']} loss" if "stage" in record else "loss"
        parts = [
            f"{what} not finite" if record["loss"] is None else f"{what} {record['loss']:.4f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self.advance(step)
        if self._lines:
            left = (time.perf_counter() - self._started) / (step - self._first) * (self._steps - step)
            log.info("step %d/%d: %s, %s left", step, self._steps, ", ".join(parts), clock(left))

    def close(self) -> None:
        self._bar.close()
