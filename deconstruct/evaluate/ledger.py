"""eval.jsonl: what was measured of a run, one object a number. What it holds is not measured again.

    {"step", "task", "metric", "value", facts such as "tokens", "skip", and the qualifiers of the task}

Several evaluators may add to it. A crash may tear its last line, or end a setting before its last metric: then the
setting is measured again, and what stands there already is not added twice.

What each item of a task gave stands beside it, in eval_items/STEP.TASK.QUALIFIERS.jsonl.gz: paired tests need it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from deconstruct.evaluate.evaluation import Evaluation, Measurement, Record, Setting
from deconstruct.paths import write_whole
from deconstruct.run.jsonl import append_jsonl, drop_torn_line, read_jsonl

ITEMS = "eval_items"


class Ledger:
    """The ledger of one run, of a model without the layers that `skip` names."""

    def __init__(self, path: epath.Path, skip: str):
        self.path, self._skip = path, skip

    def missing(self, step: int, evaluation: Evaluation) -> list[Setting]:
        """The settings of the evaluation that are not complete at `step`."""
        there = [record for record in self.records(evaluation) if record["metric"] == evaluation.last]
        return [s for s in evaluation.settings() if not any(self._is_of(record, step, s) for record in there)]

    def add(self, step: int, evaluation: Evaluation, setting: Setting, found: list[Measurement]) -> list[Record]:
        """Adds what was measured of one setting; returns its records. Raises ValueError where it does not end with the
        evaluation's last metric, as it then would never be complete."""
        metrics = [measurement.metric for measurement in found]
        if metrics[-1:] != [evaluation.last] or metrics.count(evaluation.last) != 1:
            raise ValueError(f"{evaluation.name} must measure {evaluation.last!r} once, and last")
        drop_torn_line(self.path)
        there = {_identity(record, evaluation) for record in self.records(evaluation)}
        records = []
        for metric, value, extras, items in found:
            head = {"step": step, "task": evaluation.name, "metric": metric, "value": value}
            record = {**head, **extras, "skip": self._skip, **setting}
            if items:
                record["items_file"] = self._keep(evaluation, record, items)
            if _identity(record, evaluation) not in there:
                append_jsonl(self.path, record)
            records.append(record)
        return records

    def records(self, evaluation: Evaluation) -> list[Record]:
        """All there is of an evaluation, at every step."""
        return [record for record in read_jsonl(self.path) if record["task"] == evaluation.name]

    def _keep(self, evaluation: Evaluation, record: Record, items: Sequence[Mapping[str, Any]]) -> str:
        """Writes what each item gave, a line an item; returns the file's name in the workdir."""
        curve = evaluation.curve(record).replace(f"/{record['metric']}", "", 1).replace("/", ".")
        curve = re.sub(r"[^-.\w]", "_", curve)
        name = f"{ITEMS}/{record['step']}.{curve}.jsonl.gz"
        path = self.path.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(item) + "\n" for item in items)
        write_whole(path, gzip.compress(lines.encode(), mtime=0))
        return name

    def _is_of(self, record: Record, step: int, setting: Setting) -> bool:
        wanted = {"step": step, "skip": self._skip, **setting}
        return all(record.get(key) == value for key, value in wanted.items())


def _identity(record: Record, evaluation: Evaluation) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("step", "metric", "skip", *evaluation.qualifiers))
