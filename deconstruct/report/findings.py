"""The paper's seven findings, each with what one's own runs say of it: a verdict, intervals, and the runs it rests on.

A difference is in nats a token; what is shown is the ratio of perplexities. The interval is over seeds and items, or
over items alone where there is one seed; the paper's own numbers have neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from deconstruct.compare.differences import Difference, Interval, change, difference
from deconstruct.report.study import BASELINE, Cell, Family

SHOWN, PARTLY, NOT_SHOWN, OTHERWISE, NO_RUNS = "shown", "shown in part", "not shown", "otherwise here", "no runs"
SOURCES = ("fixed_seq_qk", "static_emb_qk", "rnd_emb_qk")
HYBRIDS = ("approximate", "non_approximate", *SOURCES)
CLOSE = math.log(1 + 1.5 / 38.1)  # the paper's "within 1.5 points" of a perplexity of 38.1, as a ratio
DESTROYED = math.log(10)
FLAT = 0.01  # nats


class Finding(NamedTuple):
    """`claim`: the paper's. `criterion`: when it counts as shown. `evidence`: lines. `runs`: what it rests on.
    `needs`: what would have to be there. `missing`: how many comparisons there are no runs for."""

    number: int
    title: str
    claim: str
    criterion: str
    verdict: str
    evidence: list[str]
    runs: list[str]
    needs: str = ""
    missing: int = 0

    @property
    def said(self) -> str:
        if self.verdict == NO_RUNS:
            return f"not shown: no runs ({self.needs})"
        number = f"{self.missing} comparison{'s' if self.missing > 1 else ''}"
        return f"{self.verdict}, without runs for {number}" if self.missing else self.verdict


class Part(NamedTuple):
    """One thing that a finding says: True, False, or None where the interval leaves it open."""

    holds: bool | None
    line: str
    cells: tuple[Cell, ...]


def findings(family: Family) -> list[Finding]:
    """All seven. Raises UserError where two runs were measured on different text."""
    return [make(number, family) for number, make in enumerate(_FINDINGS, 1)]


def _without_mixing(number: int, family: Family) -> Finding:
    cell = ("mlp", "uniform")
    parts = [*_apart(family, cell, BASELINE, lambda i: _above(i, math.log(2)))]
    main = family.main()
    if parts and main is not None:
        chance = family.config.model.vocab_size
        worst = max(main.shown(family.found[name][main].value) for name in family.names(cell))
        parts.append(Part(worst < chance / 2, f"perplexity {worst:,.1f}, chance {chance:,}", (cell,)))
    return _finding(
        *(number, family, parts, "Without mixing, a model is close to useless, and yet better than chance"),
        "Uniform mlp: accuracy near chance, perplexity 993 where standard attention has 38, far below that of chance.",
        "its perplexity is more than twice standard's, and less than half of chance",
        "uniform mlp and standard",
        2,
    )


def _order(number: int, family: Family) -> Finding:
    ranks = (("standard",), ("approximate",), SOURCES, ("mlp",), ("non_approximate",))
    pairs = [(better, worse) for one, other in itertools.pairwise(ranks) for better in one for worse in other]
    parts = []
    for better, worse in pairs:
        parts += _apart(family, (worse, "uniform"), (better, "uniform"), lambda i: _above(i, 0.0))
    return _finding(
        *(number, family, parts, "The order of the uniform variants"),
        "standard 38.1 < approximate 47.9 < fixed_seq_qk 79.1, static_emb_qk 79.9, rnd_emb_qk 84.8 << mlp 993 << "
        "non_approximate (diverges).",
        "every neighbour in this order is apart, in this direction",
        "two or more uniform variants",
        len(pairs),
    )


def _hybrids(number: int, family: Family) -> Finding:
    parts = []
    for variant in HYBRIDS:
        parts += _apart(family, (variant, "even"), BASELINE, lambda i: _below(i, CLOSE))
    parts += _apart(family, ("mlp", "even"), BASELINE, lambda i: _above(i, CLOSE))
    return _finding(
        *(number, family, parts, "With standard attention in every other layer, all variants but mlp come close to it"),
        "Even hybrids: 38.5 to 39.4 where standard has 38.1; mlp 45.8.",
        f"each is within {math.expm1(CLOSE):.1%} of standard's perplexity (1.5 points of 38.1), and mlp is not",
        "even hybrids and standard",
        len(HYBRIDS) + 1,
    )


def _skip(number: int, family: Family) -> Finding:
    parts: list[Part] = []
    for skipped in reversed(family.perplexities("block")):
        whole = next((m for m in family.perplexities() if m.get("context") == skipped.get("context")), None)
        if whole is None or parts:
            continue
        for cell in family.having(skipped):
            if cell in family.having(whole):
                found = change(*family.scores([cell, cell], [skipped, whole]))
                parts.append(Part(_above(_interval(found), DESTROYED), f"{_name(cell)}: {_ratio(found)}", (cell,)))
    return _finding(
        *(number, family, parts, "The layers that fail alone carry information: a hybrid without them is destroyed"),
        "Even hybrids whose replaced blocks are skipped: perplexity 20,000 to 2,000,000.",
        "its perplexity is more than ten times the whole model's",
        "even hybrids, evaluated with --skip as well",
        len(HYBRIDS) + 1,
    )


def _length(number: int, family: Family) -> Finding:
    having = {measure: family.having(measure) for measure in family.perplexities()}
    measures = [m for m, cells in having.items() if len(cells) == max(map(len, having.values()))]
    parts = []
    if len(measures) > 1:
        short, long = measures[0], measures[-1]
        for cell in (cell for cell in having[long] if cell in having[short]):
            found = change(*family.scores([cell, cell], [long, short]))
            interval = _interval(found)
            flat = cell == ("mlp", "uniform")
            holds = _within(interval, FLAT) if flat else _below(interval, 0.0)
            line = f"{_name(cell)}: {_ratio(found)} from context {short.get('context')} to {long.get('context')}"
            parts.append(Part(holds, line, (cell,)))
    return _finding(
        *(number, family, parts, "What mixes gains from a longer context; mlp does not"),
        "Table 4: from 128 to 2,048 positions, standard goes from 69.9 to 38.1; mlp stays at 993.5.",
        f"perplexity falls with context; of uniform mlp it moves by less than {FLAT} nats",
        "runs evaluated at two contexts or more",
    )


def _one_layer(number: int, family: Family) -> Finding:
    last, quarter = ("non_approximate", "last"), ("non_approximate", "quarter")
    layers = [family.groups[cell].config.model.layers for cell in (last, quarter) if cell in family.groups]
    parts = [
        # Of four layers, a quarter is the last.
        *(_apart(family, last, quarter, lambda i: _above(i, 0.0)) if len(set(layers)) == 2 else []),
        *_apart(family, quarter, BASELINE, lambda i: _below(i, math.log(1.1))),
    ]
    return _finding(
        *(
            number,
            family,
            parts,
            "One standard layer is too little for non_approximate; a quarter of the layers is enough",
        ),
        "Standard in the last layer alone: perplexity above 400; in a quarter of the layers it is close to standard.",
        "last is behind quarter, and quarter is within 10 % of standard",
        "non_approximate in the layouts last and quarter, of more than four layers, and standard",
        2,
    )


def _outliers(number: int, family: Family) -> Finding:
    parts = []
    for layout, holds, what in (
        ("uniform", lambda largest: largest > 1e3, "above 1,000 in the paper"),
        ("even", lambda largest: largest < 10, "below 10 in the paper"),
    ):
        cell = ("non_approximate", layout)
        found = [largest_logit(family, name) for name in family.names(cell)]
        largest = [value for value in found if value is not None]
        if largest:
            line = (
                f"{_name(cell)}: largest {min(largest):,.4g} to {max(largest):,.4g} over {len(largest)} seeds ({what})"
            )
            parts.append(Part(all(map(holds, largest)), line, (cell,)))
    return _finding(
        *(number, family, parts, "Uniform non_approximate has logits that are outliers; its hybrid has none"),
        "Above 1,000 in the last layers of the uniform model, below 10 in the hybrid.",
        "the largest logit of any layer is above 1,000, and below 10",
        "non_approximate, uniform and even, evaluated with --tasks=indicators",
        2,
    )


_FINDINGS: tuple[Callable[[int, Family], Finding], ...] = (
    *(_without_mixing, _order, _hybrids, _skip, _length, _one_layer, _outliers),
)


def largest_logit(family: Family, run: str) -> float | None:
    values = [r["value"] for r in family.records[run] if (r["task"], r["metric"]) == ("indicators", "logit_largest")]
    return max(values, default=None)


def _apart(family: Family, cell: Cell, base: Cell, holds: Callable[[Interval], bool | None]) -> list[Part]:
    """One part, where both are there."""
    main = family.main()
    if main is None or not {cell, base} <= set(family.having(main)):
        return []
    ours, standing = family.scores([cell, base], [main, main])
    found = difference(ours, standing, family.floor(main))
    return [Part(holds(_interval(found)), f"{_name(cell)} to {_name(base)}: {_ratio(found)}", (cell, base))]


def _finding(
    number: int, family: Family, parts: list[Part], title: str, claim: str, criterion: str, needs: str, of: int = 0
) -> Finding:
    """`of`: how many comparisons the claim is made of, where that is known."""
    cells = tuple(dict.fromkeys(cell for part in parts for cell in part.cells))
    judged = [part.holds for part in parts]
    if not parts:
        verdict = NO_RUNS
    elif all(judged):
        verdict = SHOWN
    elif any(judged):
        verdict = PARTLY
    else:
        verdict = OTHERWISE if False in judged else NOT_SHOWN
    words = {True: "yes", False: "no", None: "open"}
    evidence = [f"{words[part.holds]}: {part.line}" for part in parts]
    missing = max(of - len(parts), 0)
    return Finding(number, title, claim, criterion, verdict, evidence, family.names(*cells), needs, missing)


def _interval(found: Difference) -> Interval:
    return found.over_seeds or found.over_items or Interval(-math.inf, math.inf)


def _above(interval: Interval, bound: float) -> bool | None:
    return True if interval.low > bound else False if interval.high < bound else None


def _below(interval: Interval, bound: float) -> bool | None:
    return True if interval.high < bound else False if interval.low > bound else None


def _within(interval: Interval, bound: float) -> bool | None:
    if -bound < interval.low and interval.high < bound:
        return True
    return False if interval.low > bound or interval.high < -bound else None


def _ratio(found: Difference) -> str:
    interval = _interval(found)
    over = "seeds and items" if found.over_seeds else "items"
    if math.isinf(interval.high):
        return f"{_times(found.value)} (one seed, and no items kept: no interval)"
    return f"{_times(found.value)} (95 % over {over}: {_times(interval.low)} to {_times(interval.high)})"


def _times(nats: float) -> str:
    ratio = math.exp(min(nats, 700.0))
    return f"x{ratio:.3f}" if ratio < 10 else f"x{ratio:,.4g}"


def _name(cell: Cell) -> str:
    return cell[0] if cell == BASELINE else f"{cell[0]} {cell[1]}"
