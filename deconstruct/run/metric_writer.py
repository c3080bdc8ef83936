"""The metrics of a run: a line of metrics.jsonl and TensorBoard events for each logged step."""

from __future__ import annotations

from typing import Any

from etils import epath

from deconstruct.run.jsonl import append_jsonl, read_jsonl, truncate_jsonl
from deconstruct.run.workdir import Workdir


def training_losses(run_dir: Workdir) -> dict[int, float]:
    """Of each logged step, nats a token; not of stages of distillation, whose losses are of another kind, nor where it
    was not finite."""
    logged = (record for record in read_jsonl(run_dir.metrics) if "stage" not in record)
    return {record["step"]: record["loss"] for record in logged if record["loss"] is not None}


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events of a workdir. One process of a run has one, the others None."""

    def __init__(self, workdir: epath.Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        truncate_jsonl(self._path, last_step)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1, flush_secs=10)

    def write(self, record: dict[str, Any]) -> None:
        """`record` has `step`, perhaps the name of a `stage`, and scalars, possibly in groups."""
        append_jsonl(self._path, record)
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, dict):
                for name, scalar in value.items():
                    self._events.add_scalar(f"{key}/{name}", scalar, step)
            elif key not in ("step", "stage") and value is not None:  # a loss that was not finite
                self._events.add_scalar(key, value, step)

    def close(self) -> None:
        self._events.close()
