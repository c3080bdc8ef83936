"""Groups of runs against a baseline, measure by measure, and what can be said of each."""

from __future__ import annotations

from typing import NamedTuple

from deconstruct.compare.differences import CONFIDENCE, Difference, Noise, Scores, corrected, difference, noise
from deconstruct.compare.groups import Group, Run
from deconstruct.compare.measures import Measure, Measured, read_measures, scores_of
from deconstruct.types import UserError

Found = dict[str, dict[Measure, Measured]]  # by the name of the run


class Row(NamedTuple):
    """A group; against the baseline, if it is another: the difference, and its p as one comparison of several."""

    group: Group
    scores: Scores
    difference: Difference | None
    p: float | None


class Comparison(NamedTuple):
    """All groups in one measure. `floor`: the noise over seeds, of all groups together."""

    measure: Measure
    baseline: Group
    rows: list[Row]
    floor: Noise | None

    def row(self, group: Group) -> Row:
        return next(row for row in self.rows if row.group is group)

    def verdict(self, row: Row) -> str:
        """better, worse or no difference; of these runs alone, where nothing is known of other seeds."""
        if row.difference is None:
            return "baseline"
        better = (row.difference.value < 0) == self.measure.lower_is_better
        word = "better" if better else "worse"
        if row.difference.over_seeds is not None:
            return word if row.p is not None and row.p < 1 - CONFIDENCE else "no difference"
        if row.difference.over_items is None:
            return "unknown"
        return f"these runs {word}" if row.difference.over_items.excludes_zero else "no difference"


def measured(groups: list[Group], steps: dict[str, int]) -> tuple[Found, list[Measure]]:
    """What was measured of each run at its step, and the measures that all of them have, in the order of the first.
    Raises UserError where there is none."""
    runs = [run for group in groups for run in group.runs]
    found = {run.name: read_measures(run, steps[run.name]) for run in runs}
    common = [measure for measure in found[runs[0].name] if all(measure in one for one in found.values())]
    if not common:
        raise UserError(f"nothing was measured of all runs alike; {_advice(runs, found)}")
    contexts = [measure for measure in common if measure.task == "perplexity"]
    contexts.sort(key=lambda measure: measure.get("context", 0))
    return found, [*contexts, *(measure for measure in common if measure not in contexts)]


def compare(groups: list[Group], baseline: Group, found: Found, measure: Measure) -> Comparison:
    """Raises UserError where two runs were measured on different items."""
    scores = scores_of(groups, found, measure)
    floor = noise(scores)
    base = next(own for group, own in zip(groups, scores, strict=True) if group is baseline)
    differences = [
        None if group is baseline else difference(own, base, floor)
        for group, own in zip(groups, scores, strict=True)
    ]  # fmt: skip
    p = iter(corrected([one for one in differences if one is not None]))
    rows = [
        Row(group, own, one, None if one is None else next(p))
        for group, own, one in zip(groups, scores, differences, strict=True)
    ]
    return Comparison(measure, baseline, rows, floor)


def _advice(runs: list[Run], found: Found) -> str:
    without = [run for run in runs if not found[run.name]]
    run = without[0] if without else runs[-1]
    return f"`deconstruct evaluate --workdir={run.run_dir.folder}` as the others, with the same --contexts and --tasks"
