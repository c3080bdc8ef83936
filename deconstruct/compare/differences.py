"""How far two groups of runs are apart, measured on the same items, with intervals over items, seeds, or both.

Run s of group g has the value y_gs = sum_d x_gsd / sum_d w_d over items d: documents (nats, and tokens) or questions
(1 for a right answer, and 1). With few seeds and many items, crossed, the variance of a difference of means is

    var = (items - rest) + seeds        items:  scipy.stats.bootstrap over items, of the difference of mean runs
                                        seeds:  s^2 (1/m + 1/k), as in scipy.stats.ttest_ind, s pooled over the groups
                                        rest:   seed x item, which is in both

Of m + k - 2 degrees of freedom for seeds and items - 1 for items, the interval is Howe's (1974): the squares of the two
half-widths add up. A bootstrap over two or three seeds would be far too narrow. A group of one seed has no spread of
its own: then s is that of all groups together, the noise floor; where there is none, nothing is said of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

CONFIDENCE, POWER, RESAMPLES = 0.95, 0.8, 2000
SAME = 1e-9  # of the unit in which values are: what is nearer is rounding
LEAST_P = 1e-12
MOST_SEEDS = 1000  # more are not counted


class Scores(NamedTuple):
    """Of the runs of a group: `values` float64 [runs, items], sums over an item; `weights` float64 [items]."""

    values: np.ndarray
    weights: np.ndarray

    @property
    def of_runs(self) -> np.ndarray:
        """[runs]"""
        return self.values.sum(1) / self.weights.sum()

    @property
    def mean(self) -> float:
        return float(self.of_runs.mean())


class Noise(NamedTuple):
    """The standard deviation over seeds of one configuration: of the value of a run, and of it the part that is the
    rest (seed x item), with degrees of freedom."""

    deviation: float
    rest: float
    freedom: int


class Interval(NamedTuple):
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Difference(NamedTuple):
    """A group's mean less the baseline's.

    over_items: these runs, on other items of the kind; None where items were not kept.
    over_seeds: runs of other seeds, on other items; None where no configuration has two seeds.
    p: of no difference: over seeds, where that is known; else over items (McNemar's where items are right or wrong).
    seeds: of each configuration, that would show a difference as large as this one with a probability of 0.8 at 95 %
    confidence; None where that is not known, infinity where only more items would, MOST_SEEDS + 1 for more than that.
    """

    value: float
    over_items: Interval | None
    over_seeds: Interval | None
    p: float
    seeds: float | None


def noise(groups: Iterable[Scores]) -> Noise | None:
    """Pooled over groups. None where none has two seeds."""
    squares = rest = 0.0
    freedom = 0
    for group in groups:
        runs, items = group.values.shape
        if runs > 1:
            freedom += runs - 1
            squares += float(np.var(group.of_runs, ddof=1)) * (runs - 1)
            if items > 1:
                shares = (group.values - group.of_runs[:, None] * group.weights[None, :]) / group.weights.sum()
                rest += float(((shares - shares.mean(0)) ** 2).sum()) * items / (items - 1)
    return Noise(math.sqrt(squares / freedom), math.sqrt(rest / freedom), freedom) if freedom else None


def difference(ours: Scores, base: Scores, floor: Noise | None = None) -> Difference:
    """`floor`: the noise of all groups, for where neither of these two has a second seed."""
    if not np.array_equal(ours.weights, base.weights):
        raise ValueError("the two groups were not measured on the same items")
    value = ours.mean - base.mean
    over_items, error = _over_items(ours.values.mean(0) - base.values.mean(0), ours.weights)
    own = noise([ours, base]) or floor
    if own is None:
        return Difference(value, over_items, None, _p_over_items(ours, base, value, error), None)
    share = 1 / len(ours.values) + 1 / len(base.values)
    return _with_seeds(value, over_items, error, own, share, len(ours.weights))


def change(after: Scores, before: Scores) -> Difference:
    """Of the same runs, measured in two ways: paired by run as well."""
    gaps = Scores(after.values - before.values, after.weights)
    over_items, error = _over_items(gaps.values.mean(0), gaps.weights)
    own = noise([gaps])
    if own is None:
        return Difference(gaps.mean, over_items, None, _p_over_items(after, before, gaps.mean, error), None)
    return _with_seeds(gaps.mean, over_items, error, own, 1 / len(gaps.values), len(gaps.weights))


def _with_seeds(
    value: float, over_items: Interval | None, error: float, own: Noise, share: float, count: int
) -> Difference:
    """`error`: over `count` items. `share`: of the variance of a run that is in the value: 1/m + 1/k."""
    items, seeds = max(error**2 - own.rest**2 * share, 0.0), own.deviation**2 * share
    if items + seeds == 0:
        return Difference(value, over_items, Interval(value, value), 1.0 if value == 0 else 0.0, None)

    def half(p: float) -> float:
        """Of the interval at confidence 1 - p."""
        t_seeds, t_items = stats.t.isf(p / 2, [own.freedom, max(count - 1, 1)])
        return math.hypot(t_seeds * math.sqrt(seeds), t_items * math.sqrt(items))

    width = half(1 - CONFIDENCE)
    p = LEAST_P if half(LEAST_P) < abs(value) else optimize.brentq(lambda p: half(p) - abs(value), LEAST_P, 1.0)
    return Difference(value, over_items, Interval(value - width, value + width), float(p), _seeds(value, own, items))


def smallest_seen(own: Noise, seeds: int) -> float:
    """The difference that so many seeds of each of two configurations would show, with a probability of 0.8; items
    aside."""
    return own.deviation * float(optimize.brentq(lambda effect: _power(effect, max(seeds, 2)) - POWER, 1e-3, 10.0))


def corrected(differences: list[Difference]) -> list[float]:
    """Their p for being one comparison of several (Holm)."""
    return list(multipletests([one.p for one in differences], method="holm")[1]) if differences else []


def _over_items(gaps: np.ndarray, weights: np.ndarray) -> tuple[Interval | None, float]:
    """Of sum gaps / sum weights: the bootstrap interval (bias-corrected and accelerated) and its standard error."""
    if len(gaps) < 2:
        return None, 0.0
    if np.ptp(gaps / weights) < SAME:  # no resampling changes it, and the interval would be 0 / 0
        return Interval(float(gaps[0] / weights[0]), float(gaps[0] / weights[0])), 0.0
    found = stats.bootstrap(
        (gaps, weights),
        lambda gaps, weights, axis: gaps.sum(axis) / weights.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        batch=max(1, 2**22 // len(gaps)),
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return Interval(float(interval.low), float(interval.high)), float(found.standard_error)


def _p_over_items(ours: Scores, base: Scores, value: float, error: float) -> float:
    runs = np.concatenate([ours.values, base.values])
    if len(runs) == 2 and set(np.unique(runs)) <= {0.0, 1.0}:
        right, other = runs[0] == 1, runs[1] == 1
        table = [[np.sum(a & b) for b in (other, ~other)] for a in (right, ~right)]
        return float(mcnemar(table, exact=True).pvalue)
    if error == 0:
        return 1.0 if value == 0 or len(ours.weights) < 2 else 0.0
    return 2 * float(stats.norm.sf(abs(value) / error))


def _seeds(value: float, own: Noise, items: float) -> float | None:
    if own.deviation == 0:
        return None
    reach = stats.norm.ppf(1 - (1 - CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    left = value**2 - reach**2 * items  # what seeds may still take of it
    if left <= 0:
        return math.inf
    effect, count = math.sqrt(left) / own.deviation, 2
    while _power(effect, count) < POWER:
        count *= 2
        if count > 2 * MOST_SEEDS:
            return MOST_SEEDS + 1
    if count == 2:
        return 2
    return math.ceil(optimize.brentq(lambda seeds: _power(effect, seeds) - POWER, count / 2, count))


def _power(effect: float, seeds: float) -> float:
    """Of a t-test on so many seeds of each of two configurations. Where it is all but one, scipy's is nan."""
    found = float(TTestIndPower().power(effect, seeds, 1 - CONFIDENCE))
    return 1.0 if math.isnan(found) else found
