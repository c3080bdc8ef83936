"""The ledger as TensorBoard events, in a folder of their own: the trainer is another process and writes beside it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from deconstruct.evaluate.evaluation import Evaluation, Record


class Curves:
    """Adds points to curves, each once, whatever is in the folder already. Writes a file only if there is one to add.

    So the whole ledger can be given to it: what an earlier process measured and could not tell TensorBoard is made up
    for.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._there = set(_points(folder))
        self._writer: Any = None

    def add(self, evaluation: Evaluation, records: Iterable[Record]) -> None:
        for record in records:
            point = (re.sub(r"[^-/\w.]", "_", evaluation.curve(record)), record["step"])
            if point not in self._there:
                self._there.add(point)
                self._open().add_scalar(point[0], record["value"], point[1])
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self._writer


def _points(folder: epath.Path) -> Iterator[tuple[str, int]]:
    """(curve, step) of every event in a folder. A record there: length (8 bytes), checksum (4), event, checksum (4)."""
    if not folder.exists():
        return
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.glob("*tfevents*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            end = at + 12 + length + 4
            if end > len(data):
                break  # torn by a crash, or being written
            event = Event.FromString(data[at + 12 : end - 4])
            yield from ((value.tag, event.step) for value in event.summary.value)
            at = end
