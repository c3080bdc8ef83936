"""Metrics out: one JSON object a line, TensorBoard beside it, and where the time went."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from etils import epath


def read_jsonl(path: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none where there is no file. A last line torn by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_jsonl(path: epath.Path, record: dict[str, Any]) -> None:
    """Adds one line, whole, and has it on disk when it returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()


def truncate_jsonl(path: epath.Path, last_step: int) -> None:
    """Drops what was logged after `last_step` (and a torn last line), so that a resumed run continues the file."""
    if path.exists():
        _replace(path, [record for record in read_jsonl(path) if record["step"] <= last_step])


def drop_torn_line(path: epath.Path) -> None:
    """Drops a last line that a crash left unfinished, so that the next one does not run into it."""
    if path.exists() and not path.read_text().endswith("\n"):
        _replace(path, read_jsonl(path))


def _replace(path: epath.Path, records: list[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(path)


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events of a workdir. One process of a run has one, the others None."""

    def __init__(self, workdir: epath.Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        truncate_jsonl(self._path, last_step)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1, flush_secs=10)

    def write(self, record: dict[str, Any]) -> None:
        """`record` has `step` and scalars, possibly in groups."""
        append_jsonl(self._path, record)
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, dict):
                for name, scalar in value.items():
                    self._events.add_scalar(f"{key}/{name}", scalar, step)
            elif key != "step":
                self._events.add_scalar(key, value, step)

    def close(self) -> None:
        self._events.close()


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
