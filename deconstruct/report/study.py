"""A folder of runs as the paper's study: which run is which variant in which layout, and what was measured of it.

A family is one of the paper's shapes: Qwen2.5 blocks (its table 1), Qwen3 blocks (table 2), grouped queries (table 3).
Within it runs may differ in variant, layout, seed and learning rate, of which each configuration's best is taken.
Runs on documents made for recall stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from deconstruct.compare.best import Sweep, best_over
from deconstruct.compare.budgets import matched
from deconstruct.compare.comparison import Comparison, Found, compare
from deconstruct.compare.differences import Scores, noise
from deconstruct.compare.groups import Group, Run, grouped, read_runs
from deconstruct.compare.measures import Measure, read_measures, scores_of
from deconstruct.config import Config
from deconstruct.layout import STANDARD
from deconstruct.report.recall import TASK, Recall, read_recall
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import UserError

Cell = tuple[str, str]  # variant, layout; standard is uniform whatever its layout is called
RATE = "learning_rate"
BASELINE: Cell = (STANDARD, "uniform")


class Family(NamedTuple):
    """Runs of one shape. `records`: of each run, its ledger at its last evaluated step."""

    table: int
    groups: dict[Cell, Group]
    sweeps: list[Sweep]
    found: Found
    records: dict[str, list[dict[str, Any]]]
    steps: dict[str, int]

    @property
    def config(self) -> Config:
        return next(iter(self.groups.values())).config

    def perplexities(self, skip: str = "") -> list[Measure]:
        """Perplexity on the validation text, by context, of any run of the family."""
        wanted = {"context", "skip"} if skip else {"context"}
        measures = {measure for of_run in self.found.values() for measure in of_run}
        plain = [m for m in measures if m.task == "perplexity" and {key for key, _ in m.setting} == wanted]
        return sorted((m for m in plain if m.get("skip", "") == skip), key=lambda m: m.get("context"))

    def having(self, measure: Measure) -> dict[Cell, Group]:
        return {
            cell: group
            for cell, group in self.groups.items()
            if all(measure in self.found[run.name] for run in group.runs)
        }

    def main(self) -> Measure | None:
        """Perplexity at the longest context that most groups have."""
        plain = self.perplexities()
        return max(plain, key=lambda m: (len(self.having(m)), m.get("context"))) if plain else None

    def comparison(self, measure: Measure) -> Comparison | None:
        """Of all groups that have the measure, against standard attention; None where that has not."""
        groups = self.having(measure)
        if BASELINE not in groups:
            return None
        return compare(list(groups.values()), groups[BASELINE], self.found, measure)

    def scores(self, cells: list[Cell], measures: list[Measure]) -> list[Scores]:
        """Of each cell in its measure, over the same items: what has none is a single number."""
        scores = [scores_of([self.groups[c]], self.found, m)[0] for c, m in zip(cells, measures, strict=True)]
        if len({len(one.weights) for one in scores}) > 1:
            scores = [Scores(one.of_runs[:, None], one.weights[:1] * 0 + 1) for one in scores]
        return scores

    def floor(self, measure: Measure) -> Any:
        return noise(scores_of(self.having(measure).values(), self.found, measure))

    def values(self, cell: Cell, task: str, metric: str, skip: str = "") -> list[float]:
        """A number of the ledger, of each run of a cell that has it."""
        group = self.groups.get(cell)
        found = []
        for run in group.runs if group else []:
            own = [
                record["value"]
                for record in self.records[run.name]
                if (record["task"], record["metric"], record.get("skip", "")) == (task, metric, skip)
            ]
            found += own[-1:]
        return found

    def names(self, *cells: Cell) -> list[str]:
        return [run.name for cell in cells if cell in self.groups for run in self.groups[cell].runs]


class Study(NamedTuple):
    folder: str
    families: dict[int, Family]  # by the number of the paper's table
    recall: Recall | None  # runs whose recall was measured are of no family
    without: list[str]  # runs that were not evaluated


def read_study(folders: Sequence[str]) -> Study:
    """Raises UserError where no run was evaluated, or runs of one family differ in what they should not."""
    folder = ", ".join(folders)
    recalling: list[Run] = []
    without: list[Run] = []
    tables: dict[int, list[Run]] = {}
    for run in read_runs(folders):
        tasks = {record["task"] for record in read_jsonl(run.run_dir.evaluations)}
        if not tasks:
            without.append(run)
        elif TASK in tasks:
            recalling.append(run)
        else:
            tables.setdefault(_table(run.config), []).append(run)
    if not tables and not recalling:
        raise UserError(f"{folder}: no run in it was evaluated; `deconstruct evaluate` does so")
    families = {number: _family(folder, number, tables[number]) for number in sorted(tables)}
    recall = read_recall(folder, recalling, matched(recalling, "end")) if recalling else None
    return Study(folder, families, recall, [run.name for run in without])


def cell_of(group: Group) -> Cell:
    variant = group.config.variant
    return (variant, "uniform" if variant == STANDARD else group.config.layout)


def _table(config: Config) -> int:
    if config.model.block == "qwen3":
        return 2
    return 1 if config.model.kv_heads == config.model.num_heads else 3


def _family(folder: str, number: int, runs: list[Run]) -> Family:
    groups = grouped(runs)
    for key in groups[0].values:
        if key not in ("variant", "layout", RATE):
            values = " and ".join(sorted({group.values[key] for group in groups})[:2])
            raise UserError(
                f"{folder}: its runs differ in {key} ({values}), which is not the paper's question; give the runs of "
                "each a folder of their own"
            )
    steps = matched(runs, "end")
    found = {run.name: read_measures(run, steps[run.name]) for run in runs}
    records = {
        run.name: [record for record in read_jsonl(run.run_dir.evaluations) if record["step"] == steps[run.name]]
        for run in runs
    }
    sweeps: list[Sweep] = []
    if RATE in groups[0].values:
        family = Family(number, {(group.label, ""): group for group in groups}, [], found, records, steps)
        main = family.main()
        if main is None or len(family.having(main)) < len(groups):
            raise UserError(f"{folder}: to find the best {RATE}, evaluate perplexity of all runs at one context")
        sweeps = best_over(RATE, groups, found, main)
        groups = [sweep.group for sweep in sweeps]
    cells: dict[Cell, Group] = {}
    for group in groups:
        if cell_of(group) in cells:
            raise UserError(f"{folder}: holds {group.label} twice, under two layouts; leave one of them out")
        cells[cell_of(group)] = Group({"variant": cell_of(group)[0], "layout": cell_of(group)[1]}, group.runs)
    return Family(number, cells, sweeps, found, records, steps)
