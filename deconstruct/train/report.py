"""What a run says of its steps: lines of metrics, progress, and updates that were skipped."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import jax
import numpy as np

from deconstruct.config import Config
from deconstruct.data.pipeline import Batches
from deconstruct.run.clock import Clock
from deconstruct.run.jsonl import append_jsonl
from deconstruct.run.metric_writer import MetricWriter
from deconstruct.run.workdir import Workdir
from deconstruct.train.distillation import stage_of
from deconstruct.train.progress import Progress

log = logging.getLogger(__name__)


class SkippedTooOftenError(FloatingPointError):
    """So many updates in a row were skipped that the state itself must be at fault. `first`: the first such step."""

    def __init__(self, message: str, first: int):
        super().__init__(message)
        self.first = first


class Report:
    """Called with each step's device metrics, one step late; writes what is due. `in_a_row` counts the updates skipped
    up to the latest step it was called with."""

    def __init__(
        self,
        config: Config,
        run_dir: Workdir,
        clock: Clock,
        batches: Batches,
        first: int,
        utilisation_per_rate: float | None,
        writes: bool,
    ):
        self._config, self._run_dir, self._clock, self._batches = config, run_dir, clock, batches
        self._utilisation_per_rate = utilisation_per_rate  # MFU at one step a second, where the peak is known
        self._out = MetricWriter(run_dir.folder, first) if writes else None
        self._progress = Progress(first, config.steps)
        self._logged, self._time = first, time.perf_counter()
        self.in_a_row = 0

    def __call__(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Raises SkippedTooOftenError, on all processes alike."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.in_a_row = values.pop("in_a_row")
        if self.in_a_row:
            self._skipped(step, values)
        if step % self._config.log_every == 0 or step in (1, self._config.steps):
            self._write(step, values)
        else:
            self._progress.advance(step)
        if self.in_a_row >= self._config.faults.in_a_row:
            raise SkippedTooOftenError(
                f"step {step}: {self.in_a_row} updates in a row were skipped ({_why(values)}); "
                f"{self._run_dir.skipped} has their batches",
                step - self.in_a_row + 1,
            )

    def close(self) -> None:
        self._progress.close()
        if self._out:
            self._out.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        now = time.perf_counter()
        rate = (step - self._logged) / (now - self._time)  # steps a second
        self._logged, self._time = step, now
        tokens_per_second = rate * self._config.batch_size * self._config.sequence_length
        stage = stage_of(self._config.distill, step)
        named = {"stage": stage} if stage else {}
        record: dict[str, Any] = {"step": step, **named, **_as_json(values)}
        record["tokens_per_second"] = round(tokens_per_second, 1)
        if self._utilisation_per_rate is not None and not stage:  # the FLOPs of an ordinary step
            record["mfu"] = round(rate * self._utilisation_per_rate, 4)
        record["seconds"] = self._clock.take()
        if self._out:
            self._out.write(record)
        self._progress.report(step, record)

    def _skipped(self, step: int, values: dict[str, Any]) -> None:
        """Says so, and writes down what the batch was made of."""
        if not self._out:
            return
        log.warning(
            "step %d: the update is skipped (%s); %d in a row, %d in all",
            *(step, _why(values), self.in_a_row, values["skipped"]),
        )
        windows, rows = self._batches.of_step(step - 1)
        counts = np.bincount(rows.reshape(-1))
        tokens = {
            "least": int(rows.min()),
            "most": int(rows.max()),
            "distinct": int((counts > 0).sum()),
            "share_of_commonest": round(float(np.max(counts)) / rows.size, 4),
        }
        # The windows and tokens are those of this process: with several, the others hold the rest of the batch.
        append_jsonl(
            self._run_dir.skipped, {"step": step, **_as_json(values), "windows": windows, "tokens_of_windows": tokens}
        )


def _why(values: dict[str, Any]) -> str:
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return f"a spike: its norm is {values['update_norm']:.3g} times the learning rate"
    return f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
