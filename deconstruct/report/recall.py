"""Recall beside what a model keeps for it: runs on documents that are made to be recalled from (`data/recall`)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from deconstruct.compare.comparison import Comparison, compare, measured
from deconstruct.compare.groups import Group, Run, find_baseline, grouped
from deconstruct.costs import accounting
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import UserError

TASK, ACCURACY = "recall", "accuracy"


class Recall(NamedTuple):
    """`documents`: of what kind they are. `accuracy`: of every group, beside standard attention where there is some."""

    documents: str
    accuracy: Comparison

    @property
    def groups(self) -> list[Group]:
        return [row.group for row in self.accuracy.rows]


def read_recall(folder: str, runs: list[Run], steps: dict[str, int]) -> Recall:
    """Of runs whose recall was measured, each at its step. Raises UserError where it was not measured alike."""
    kinds = {
        str(record["kind"]): run.name
        for run in runs
        for record in read_jsonl(run.run_dir.evaluations)
        if (record["task"], record["metric"], record["step"]) == (TASK, ACCURACY, steps[run.name])
    }
    if len(kinds) > 1:
        one, other = list(kinds.items())[:2]
        raise UserError(f"{folder}: recall of {one[1]} is of {one[0]}, of {other[1]} of {other[0]}; report them apart")
    groups = grouped(runs)
    found, measures = measured(groups, steps)
    accuracy = next((m for m in measures if (m.task, m.metric) == (TASK, ACCURACY)), None)
    if accuracy is None:
        raise UserError(f"{folder}: recall was not measured of all runs alike; evaluate all with the same --recall")
    return Recall(next(iter(kinds)), compare(groups, find_baseline(groups, None), found, accuracy))


def state_bytes(group: Group) -> int:
    """What decoding keeps of one document, of all layers, in 16 bit."""
    model = dataclasses.replace(group.config.model, dtype="bfloat16")
    return accounting.cache_bytes(model, 1, group.config.sequence_length)
