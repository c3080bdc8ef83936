"""What was measured of runs, in the ledger and item by item, as arrays that can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from deconstruct.compare.differences import Scores
from deconstruct.compare.groups import Group, Run
from deconstruct.evaluate.evaluation import qualifiers_of
from deconstruct.evaluate.ledger import read_items
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import UserError

LOSS, ACCURACIES = "nll", ("acc", "accuracy")
FEWEST_DOCUMENTS = 20  # with fewer, their pieces are the items


class Measure(NamedTuple):
    """One task in one setting. `metric`: nll (nats a token; lower is better) or an accuracy (a share; higher is
    better). `setting`: the qualifiers that do not go without saying."""

    task: str
    metric: str
    setting: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        said = [f"{key} {value}" for key, value in self.setting if key != "data"]  # a hash of the questions
        return ", ".join([self.task, *said])

    @property
    def lower_is_better(self) -> bool:
        return self.metric == LOSS

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.setting).get(key, default)

    def shown(self, value: float) -> float:
        """A value as people read it: perplexity, or percent."""
        return math.exp(min(value, 700.0)) if self.metric == LOSS else 100 * value


class Measured(NamedTuple):
    """Of one run: the ledger's number, and of each item what it is, its sum and its weight (empty where not kept)."""

    value: float
    items: list[tuple[int, int]]  # document or question, and piece of it
    values: np.ndarray
    weights: np.ndarray


def read_measures(run: Run, step: int) -> dict[Measure, Measured]:
    """All of a run at a step that is a loss or an accuracy."""
    found: dict[Measure, float] = {}
    files: dict[tuple[Any, ...], str] = {}  # of a task in a setting; any of its records may name it
    for record in read_jsonl(run.run_dir.evaluations):
        usual = qualifiers_of(record["task"])
        if record["step"] != step or usual is None:
            continue
        setting = {key: record.get(key, plain) for key, plain in usual.items()}
        if setting.get("windows") == "non-overlapping":
            setting["stride"] = None  # is the context
        said = tuple((key, value) for key, value in setting.items() if value != usual[key])
        if "items_file" in record:
            files[record["task"], said] = record["items_file"]
        if record["metric"] in (LOSS, *ACCURACIES):
            found[Measure(record["task"], record["metric"], said)] = float(record["value"])
    return {
        measure: Measured(value, *_items(run, measure, files.get((measure.task, measure.setting))))
        for measure, value in found.items()
    }


def scores_of(groups: Iterable[Group], found: dict[str, dict[Measure, Measured]], measure: Measure) -> list[Scores]:
    """Of each group, over the same items; over the runs' numbers alone where any run has kept no items. Raises
    UserError where two runs were measured on different ones."""
    runs = [[found[run.name][measure] for run in group.runs] for group in groups]
    flat = [(run.name, found[run.name][measure]) for group in groups for run in group.runs]
    if any(not measured.items for _, measured in flat):
        return [Scores(np.array([[one.value] for one in group]), np.ones(1)) for group in runs]
    first_name, first = flat[0]
    for name, measured in flat[1:]:
        if measured.items != first.items or not np.array_equal(measured.weights, first.weights):
            raise UserError(
                f"{measure.name}: {first_name} ({len(first.items)} items) and {name} ({len(measured.items)}) were not "
                "measured on the same text or questions; compare them apart"
            )
    return [Scores(np.array([one.values for one in group]), first.weights) for group in runs]


def _items(run: Run, measure: Measure, file: str | None) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Which items they are, their sums and weights; nothing where none were kept of this metric."""
    path = run.run_dir.folder / file if file else None
    rows = read_items(path) if path is not None and path.exists() else []
    key = "logliks" if measure.metric == LOSS else measure.metric
    if not all(key in row for row in rows):
        rows = []
    if measure.metric == LOSS:
        sums = [(-sum(row["logliks"]), float(row.get("tokens", 1))) for row in rows]
    else:
        sums = [(float(row[measure.metric]), 1.0) for row in rows]
    identities = [int(row["id"]) for row in rows]
    values, weights = np.array(sums, np.float64).reshape(-1, 2).T
    distinct, which = np.unique(identities, return_inverse=True)
    if FEWEST_DOCUMENTS <= len(distinct) < len(rows):  # pieces of a document go together
        summed = [np.bincount(which, of, len(distinct)).astype(np.float64) for of in (values, weights)]
        return [(int(document), 0) for document in distinct], summed[0], summed[1]
    seen: dict[int, int] = {}
    items = []
    for identity in identities:
        items.append((identity, seen.get(identity, 0)))
        seen[identity] = seen.get(identity, 0) + 1
    order = sorted(range(len(items)), key=items.__getitem__)
    return [items[i] for i in order], values[order], weights[order]
