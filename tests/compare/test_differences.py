"""Intervals: against scipy and by hand on small cases; their size and their power on drawn runs."""

import numpy as np
import pytest

from tests.need import need
from tests.tiny import quick

need("statsmodels", extra="compare")
from scipy import stats  # noqa: E402

from deconstruct.compare import differences  # noqa: E402
from deconstruct.compare.differences import (  # noqa: E402
    MOST_SEEDS,
    Noise,
    Scores,
    corrected,
    difference,
    noise,
    smallest_seen,
)

DRAW = np.random.default_rng(0)


def drawn(rng, runs, items=60, *, mean=3.0, seed=0.01, item=0.5, rest=0.02, hard=None):
    """Runs of one configuration: an effect of the seed, of the item (the same for all), and of both."""
    hard = rng.normal(0, item, items) if hard is None else hard
    weights = np.linspace(20.0, 200.0, items)
    values = mean + rng.normal(0, seed, (runs, 1)) + hard[None, :] + rng.normal(0, rest, (runs, items))
    return Scores(values * weights[None, :], weights)


def test_over_seeds_alone_it_is_the_t_test():
    ours, base = DRAW.normal(3.0, 0.1, (4, 1)), DRAW.normal(3.1, 0.1, (3, 1))
    found = difference(Scores(ours, np.ones(1)), Scores(base, np.ones(1)))
    expected = stats.ttest_ind(ours[:, 0], base[:, 0])
    assert found.value == pytest.approx(ours.mean() - base.mean(), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.over_seeds == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert found.over_items is None


def test_over_documents_alone_it_is_the_paired_bootstrap_of_a_ratio():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 0.5, 60)
    ours, base = drawn(rng, 1, hard=hard), drawn(rng, 1, mean=3.02, hard=hard, rest=0.1)
    found = difference(ours, base)
    gaps = ours.values[0] - base.values[0]
    expected = stats.bootstrap(
        (gaps, ours.weights), lambda g, w: g.sum() / w.sum(), paired=True, vectorized=False, n_resamples=2000, rng=rng
    ).confidence_interval
    # Two bootstraps of 2,000 resamplings: their ends differ by a few per cent of the width.
    assert found.over_items == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
    by_hand = np.sqrt(((gaps - found.value * ours.weights) ** 2).sum()) / ours.weights.sum()  # of a ratio of sums
    assert (found.over_items.high - found.over_items.low) / 3.92 == pytest.approx(by_hand, rel=0.1)
    assert found.over_seeds is None and found.seeds is None


def test_right_and_wrong_answers_are_mcnemars():
    """8 questions answered otherwise, one of them rightly by ours alone: 2 (C(8, 0) + C(8, 1)) / 2^8."""
    base = np.ones(20)
    ours = base.copy()
    ours[:7], base[7] = 0, 0
    found = difference(Scores(ours[None], np.ones(20)), Scores(base[None], np.ones(20)))
    assert found.value == pytest.approx(-6 / 20)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)


def test_noise_is_the_pooled_deviation_over_seeds():
    groups = [Scores(np.array(values)[:, None], np.ones(1)) for values in ([1.0, 3.0], [5.0, 5.0, 8.0], [4.0])]
    found = noise(groups)
    assert found == (pytest.approx(np.sqrt((2 + 6) / 3)), 0.0, 3)
    assert noise(groups[2:]) is None
    # Two groups of 3: scipy's power of a t-test at that difference is 0.8.
    from statsmodels.stats.power import TTestIndPower

    effect = smallest_seen(Noise(2.0, 0.0, 3), 3) / 2.0
    assert TTestIndPower().power(effect, 3, 0.05) == pytest.approx(0.8, abs=1e-6)


SITUATIONS = {
    "seeds differ": ({}, 3, 3),
    "two seeds": ({}, 2, 2),
    "only answers differ": ({"seed": 0.0, "rest": 0.2}, 3, 3),
    "no seed but elsewhere": ({}, 1, 1),
}


@pytest.mark.parametrize("situation", quick(list(SITUATIONS), ["two seeds"]))
def test_size_and_power(situation, monkeypatch):
    """Of 200 drawings of one configuration about 95 % are 'no difference': 0.95 - 3 sqrt(0.95 x 0.05 / 200) = 0.904.
    A planted difference of six deviations of their means is found in nearly all, as a t-test on as few seeds does."""
    monkeypatch.setattr(differences, "RESAMPLES", 300)  # enough for a standard error, which is all that is used of it
    effects, m, k = SITUATIONS[situation]
    rng = np.random.default_rng(2)
    right = found = 0
    for number in range(200):
        hard = rng.normal(0, 0.5, 60)
        base, ours = (drawn(rng, runs, hard=hard, **effects) for runs in (k, m))
        floor = noise([drawn(rng, 4, hard=hard, **effects)]) if m == 1 else None
        null = difference(ours, base, floor)
        right += not null.over_seeds.excludes_zero
        assert (null.p > 0.05) == (not null.over_seeds.excludes_zero)
        if number >= 50:
            continue
        deviation = np.sqrt(effects.get("seed", 0.01) ** 2 + effects.get("rest", 0.02) ** 2 / 60) * np.sqrt(
            1 / m + 1 / k
        )
        planted = ours._replace(values=ours.values - 6 * deviation * ours.weights[None, :])
        found += difference(planted, base, floor).over_seeds.high < 0
    assert 0.904 <= right / 200 <= 0.995
    assert found / 50 >= (0.75 if m == 2 else 0.9)


def test_how_many_seeds_would_decide():
    base = drawn(np.random.default_rng(3), 3, seed=0.02, rest=0.0)
    apart = {gap: base._replace(values=base.values + gap * base.weights[None, :]) for gap in (0.0, 0.001, 0.05, 1.0)}
    deviation = noise([base]).deviation
    seeds = {gap: difference(ours, base).seeds for gap, ours in apart.items()}
    assert seeds[1.0] == 2 and 2 < seeds[0.05] < 30 and seeds[0.001] > MOST_SEEDS
    assert seeds[0.05] == pytest.approx(16 * (deviation / 0.05) ** 2 + 1, abs=2)  # the rule of thumb, 16 / effect^2
    # What differs by document is not decided by seeds.
    uneven = base._replace(values=base.values + DRAW.normal(0, 0.5, base.values.shape[1])[None, :] * base.weights)
    assert difference(uneven, base).seeds == np.inf


def test_several_comparisons_are_corrected():
    base = drawn(np.random.default_rng(4), 3)
    others = [base._replace(values=base.values + gap * base.weights[None, :]) for gap in (0.02, 0.03, 0.0)]
    found = [difference(one, base) for one in others]
    p = [one.p for one in found]
    assert corrected(found) == pytest.approx([min(1, 2 * p[0]), min(1, 3 * p[1]), 1.0])
    assert corrected([]) == []


def test_equal_runs_and_others_items():
    base = drawn(np.random.default_rng(5), 1)
    same = difference(base, base)
    assert (same.value, same.over_items, same.p) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="not measured on the same items"):
        difference(base, base._replace(weights=base.weights + 1))
