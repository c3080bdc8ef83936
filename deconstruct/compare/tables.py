"""Comparisons as tables: Markdown, which reads well on a terminal too, and CSV with all digits."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from deconstruct.compare.best import Sweep
from deconstruct.compare.comparison import Comparison, Row
from deconstruct.compare.differences import MOST_SEEDS, Interval, smallest_seen
from deconstruct.compare.measures import Measure


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose columns stand under each other; the first `words` to the left, numbers to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(parts) + " |")
    rule = [("-" * w if i < words else "-" * max(w - 1, 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def means(comparisons: list[Comparison]) -> str:
    """Every group in every measure: the mean over its seeds, and their standard deviation."""
    first = comparisons[0]
    heads = ["group", "seeds", *(_head(one.measure) for one in comparisons)]
    rows = [
        [row.group.label, str(len(row.group.runs)), *(mean_and_spread(one.rows[i], one.measure) for one in comparisons)]
        for i, row in enumerate(first.rows)
    ]
    return markdown(heads, rows)


def mean_and_spread(row: Row, measure: Measure) -> str:
    of_runs = [measure.shown(value) for value in row.scores.of_runs]
    spread = f" ± {_short(float(np.std(of_runs, ddof=1)))}" if len(of_runs) > 1 else ""
    return _short(measure.shown(row.scores.mean)) + spread


def differences(one: Comparison) -> str:
    return markdown(*difference_rows(one))


def difference_rows(one: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads, and every group less the baseline, in nats a token or points of a hundred."""
    heads = ["group", "seeds", "difference", "%", "95 % over items", "95 % over seeds and items", "p (Holm)", "verdict"]
    rows = []
    for row in one.rows:
        cells, found = [row.group.label, str(len(row.group.runs))], row.difference
        if found is None:
            cells += [*[""] * 5, one.verdict(row), ""]
        else:
            cells += [_signed(found.value, one.measure), f"{100 * math.expm1(min(found.value, 700.0)):+.1f}"]
            cells += [_interval(interval, one.measure) for interval in (found.over_items, found.over_seeds)]
            cells += [_p(row.p), one.verdict(row), _seeds(found.seeds)]
        rows.append(cells)
    heads.append("seeds to decide")
    if not one.measure.lower_is_better:  # a ratio is of perplexities
        heads, rows = [*heads[:3], *heads[4:]], [[*row[:3], *row[4:]] for row in rows]
    return heads, rows


def noise_floor(one: Comparison) -> str:
    """In a line: what seeds of one configuration do."""
    if one.floor is None:
        return (
            "Noise floor: unknown, no configuration has two seeds. Intervals are over items alone: they say of these "
            "runs whether they differ, and not whether the configurations do."
        )
    seeds = min(len(row.group.runs) for row in one.rows)
    unit, scale = ("nats a token", 1.0) if one.measure.lower_is_better else ("points", 100.0)
    return (
        f"Noise floor: seeds of one configuration have a standard deviation of {scale * one.floor.deviation:.3g} "
        f"{unit} ({one.floor.freedom} degrees of freedom). {max(seeds, 2)} seeds of each show a difference of "
        f"{scale * smallest_seen(one.floor, seeds):.3g} with a probability of 0.8; items aside."
    )


def sweeps(found: list[Sweep], key: str, measure: Measure) -> str:
    heads = ["configuration", f"best {key}", _head(measure), "of", ""]
    rows = []
    for one in found:
        best = next(values for value, values in one.points if value == one.best)
        others = ", ".join(f"{value:g}" for value, _ in one.points)
        edge = "at the edge: widen the sweep" if one.at_the_edge else ""
        rows.append([one.label, f"{one.best:g}", _short(measure.shown(float(np.mean(best)))), others, edge])
    return markdown(heads, rows)


def as_csv(comparisons: list[Comparison]) -> str:
    """A line for each measure and group. Differences and intervals in nats a token, or shares."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = list(comparisons[0].rows[0].group.values)
    measured = ("seeds", "items", "mean", "deviation_over_seeds", "difference", "items_low", "items_high", "seeds_low")
    writer.writerow(
        ["task", "metric", "setting", *keys, *measured, "seeds_high", "p", "p_holm", "verdict", "seeds_to_decide"]
    )
    for one in comparisons:
        for row in one.rows:
            of_runs, found = row.scores.of_runs, row.difference
            setting = " ".join(f"{key}={value}" for key, value in one.measure.setting)
            deviation = float(np.std(of_runs, ddof=1)) if len(of_runs) > 1 else ""
            cells = [one.measure.task, one.measure.metric, setting, *row.group.values.values(), len(of_runs)]
            cells += [len(row.scores.weights), row.scores.mean, deviation]
            if found is not None:
                cells += [found.value, *(found.over_items or ("", "")), *(found.over_seeds or ("", ""))]
                cells += [found.p, row.p, one.verdict(row), "" if found.seeds is None else found.seeds]
            else:
                cells += [*[""] * 7, one.verdict(row), ""]
            writer.writerow(cells)
    return out.getvalue()


def _head(measure: Measure) -> str:
    return (
        measure.name if measure.task == "perplexity" else f"{measure.name} {'ppl' if measure.lower_is_better else '%'}"
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _signed(value: float, measure: Measure) -> str:
    return f"{value:+.4f}" if measure.lower_is_better else f"{100 * value:+.2f}"


def _interval(interval: Interval | None, measure: Measure) -> str:
    if interval is None:
        return ""
    return f"{_signed(interval.low, measure)} to {_signed(interval.high, measure)}"


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds(seeds: float | None) -> str:
    if seeds is None:
        return ""
    if math.isinf(seeds):
        return "more items"
    return f"{seeds:.0f}" if seeds <= MOST_SEEDS else f"> {MOST_SEEDS}"
