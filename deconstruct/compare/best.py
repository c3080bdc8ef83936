"""The best value of a key (the learning rate) for each configuration: none loses by a value made for another."""

from __future__ import annotations

import math
from typing import NamedTuple

from deconstruct.compare.comparison import Found
from deconstruct.compare.groups import Group
from deconstruct.compare.measures import Measure
from deconstruct.evaluate.table import value_of
from deconstruct.types import UserError


class Sweep(NamedTuple):
    """One configuration over the values of a key: `points` (value, [of each run: nats a token, or a share]) ascending,
    and the best of them."""

    label: str
    points: list[tuple[float, list[float]]]
    best: float
    at_the_edge: bool
    group: Group


def best_over(key: str, groups: list[Group], found: Found, measure: Measure) -> list[Sweep]:
    """For each configuration, but for `key`, the group that is best in a measure, by the mean of its runs. Raises
    UserError where the key is the same in all groups, or no number."""
    if key not in groups[0].values:
        differ = ", ".join(groups[0].values) or "no key"
        raise UserError(f"--best-over={key}: is the same in all runs; {differ} differs")
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if not isinstance(value_of(group.config, key), int | float):
            raise UserError(f"--best-over={key}: {group.values[key]} is no number")
        families.setdefault(tuple(v for k, v in group.values.items() if k != key), []).append(group)
    return [_sweep(key, family, found, measure) for family in families.values()]


def _sweep(key: str, family: list[Group], found: Found, measure: Measure) -> Sweep:
    family = sorted(family, key=lambda group: value_of(group.config, key))
    values = [[found[run.name][measure].value for run in group.runs] for group in family]
    sign = 1 if measure.lower_is_better else -1
    means = [sign * sum(of_runs) / len(of_runs) for of_runs in values]
    means = [mean if math.isfinite(mean) else math.inf for mean in means]
    best = means.index(min(means))
    points = [float(value_of(group.config, key)) for group in family]
    others = {k: v for k, v in family[0].values.items() if k != key}
    label = family[0]._replace(values=others).label
    edge = len(family) > 1 and best in (0, len(family) - 1)
    return Sweep(label, list(zip(points, values, strict=True)), points[best], edge, family[best])
