"""Comparisons as pictures. Each function gives a matplotlib figure; files and pages are made of them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deconstruct.compare.best import Sweep
from deconstruct.compare.comparison import Comparison
from deconstruct.compare.measures import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A line of loss: where (steps, tokens, ...), and the loss of each run there [runs, points].
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


def colours(labels: Sequence[str]) -> dict[str, Any]:
    """A colour for each group: a variant keeps its own in every picture, whatever its layout."""
    import matplotlib

    names = list(dict.fromkeys(label.split(", ")[0] for label in labels))
    palette = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    return {label: palette[names.index(label.split(", ")[0]) % len(palette)] for label in labels}


def styles(labels: Sequence[str]) -> dict[str, Any]:
    """A dash for each group of one colour."""
    count: dict[str, int] = {}
    dashes = {}
    for label in labels:
        name = label.split(", ")[0]
        dashes[label] = ("-", "--", ":", "-.")[count.get(name, 0) % 4]
        count[name] = count.get(name, 0) + 1
    return dashes


def loss_curves(curves: Curves, budget: str) -> Figure:
    """Training loss: the mean over seeds, and the least and the most of them as a band."""
    figure, axis = axes()
    colour, dash = colours(list(curves)), styles(list(curves))
    for label, (where, losses) in curves.items():
        axis.plot(where, losses.mean(0), dash[label], color=colour[label], linewidth=1.2, label=label)
        if len(losses) > 1:
            axis.fill_between(where, losses.min(0), losses.max(0), color=colour[label], alpha=0.2, linewidth=0)
    axis.set_xlabel("steps" if budget == "end" else f"{budget} of training")
    axis.set_ylabel("training loss (nats a token)")
    _legend(axis, len(curves))
    return figure


def perplexity_by_context(comparisons: Sequence[Comparison]) -> Figure:
    """A line for each group; the bars are the least and the most of its seeds."""
    figure, axis = axes()
    contexts = [one.measure.get("context") for one in comparisons]
    labels = [row.group.label for row in comparisons[0].rows]
    colour, dash = colours(labels), styles(labels)
    for i, label in enumerate(labels):
        shown = np.array([[one.measure.shown(v) for v in one.rows[i].scores.of_runs] for one in comparisons])
        mean = np.array([one.measure.shown(one.rows[i].scores.mean) for one in comparisons])
        spread = np.abs(np.stack([shown.min(1), shown.max(1)]) - mean[None, :])
        axis.errorbar(
            contexts, mean, spread, fmt=f"o{dash[label]}", color=colour[label], markersize=3, linewidth=1.2, label=label
        )
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="perplexity")
    axis.set_xticks(contexts, [str(context) for context in contexts])
    axis.minorticks_off()
    _plain_ticks(axis)
    _legend(axis, len(labels))
    return figure


def differences(one: Comparison) -> Figure:
    """Every group less the baseline, with the interval that the verdict rests on."""
    rows = [row for row in one.rows if row.difference is not None]
    figure, axis = axes(height=0.9 + 0.28 * len(rows))
    scale = 1.0 if one.measure.lower_is_better else 100.0
    for place, row in enumerate(reversed(rows)):
        assert row.difference is not None
        value = scale * row.difference.value
        for interval, width, alpha in ((row.difference.over_seeds, 1.2, 1.0), (row.difference.over_items, 4.0, 0.4)):
            if interval is not None:
                axis.plot(
                    [scale * interval.low, scale * interval.high], [place, place], color="C0", lw=width, alpha=alpha
                )
        axis.plot([value], [place], "o", color="C0", markersize=4)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.group.label for row in reversed(rows)], fontsize=8)
    axis.set_xlabel(
        f"{one.measure.name}: less {one.baseline.label} ({'nats a token' if scale == 1 else 'points'})\n"
        "thick: 95 % over items, thin: over seeds too",
        fontsize=8,
    )
    return figure


def principle_by_layout(one: Comparison, principles: Mapping[str, str]) -> Figure | None:
    """Perplexity of each variant (named with the principle it relaxes) in each layout; None with fewer than two of
    both together. The colour is the difference from the baseline."""
    variants = list(dict.fromkeys(row.group.config.variant for row in one.rows))
    layouts = list(dict.fromkeys(row.group.config.layout for row in one.rows))
    if len(variants) * len(layouts) < 2:
        return None
    cells = np.full((len(variants), len(layouts)), np.nan)
    gaps = cells.copy()
    base = one.row(one.baseline).scores.mean
    for row in one.rows:
        place = variants.index(row.group.config.variant), layouts.index(row.group.config.layout)
        if np.isnan(cells[place]):  # where other keys differ too, the first group stands for all
            cells[place], gaps[place] = one.measure.shown(row.scores.mean), row.scores.mean - base
    figure, axis = axes(width=2.6 + 0.9 * len(layouts), height=1.0 + 0.42 * len(variants))
    most = float(np.nanmax(np.abs(gaps))) or 1.0
    colour = "RdBu_r" if one.measure.lower_is_better else "RdBu"
    axis.imshow(np.sign(gaps) * np.sqrt(np.abs(gaps) / most), cmap=colour, vmin=-1.4, vmax=1.4, aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        text = "" if np.isnan(value) else f"{value:,.1f}" if value < 1e4 else f"{value:.0e}"
        axis.text(j, i, text, ha="center", va="center", fontsize=8)
    names = [f"{v}\n{principles[v]}" if principles.get(v) else v for v in variants]
    axis.set_yticks(range(len(variants)), names, fontsize=7)
    axis.set_xticks(range(len(layouts)), layouts, fontsize=8)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.set_title(f"{one.measure.name}" + ("" if one.measure.lower_is_better else " (%)"), fontsize=9)
    return figure


def value_by_state(one: Comparison, sizes: Mapping[str, int]) -> Figure:
    """The measure by the bytes that decoding keeps, `sizes` of each group by its label: a dot for each seed, a large
    one for their mean. A layout has a marker of its own."""
    figure, axis = axes(height=4.2)
    labels = [row.group.label for row in one.rows]
    colour = colours(labels)
    layouts = list(dict.fromkeys(row.group.config.layout for row in one.rows))
    for row in one.rows:
        label = row.group.label
        shown = [one.measure.shown(value) for value in row.scores.of_runs]
        marker = "os^Dv*"[layouts.index(row.group.config.layout) % 6]
        axis.plot([sizes[label]] * len(shown), shown, ".", color=colour[label], markersize=3, alpha=0.6)
        mean = one.measure.shown(row.scores.mean)
        axis.plot([sizes[label]], [mean], marker, color=colour[label], markersize=6, alpha=0.8, label=label)
    least = min((size for size in sizes.values() if size), default=1)
    axis.set_xscale("symlog", linthresh=least / 2)  # mlp keeps nothing
    axis.set_xlim(left=-least / 20)
    axis.set(xlabel="bytes that decoding keeps", ylabel=f"{one.measure.name} (%)")
    axis.minorticks_off()
    _legend(axis, len(labels))
    return figure


def time_by_length(bench: Mapping[str, Any]) -> Figure:
    """Milliseconds of one decoded token by what was read before it: `deconstruct bench contexts --json`."""
    figure, axis = axes()
    labels = list(bench["variants"])
    colour = colours(labels)
    for label, row in bench["variants"].items():
        axis.plot(bench["contexts"], row["milliseconds"], "o-", color=colour[label], markersize=3, lw=1.2, label=label)
    axis.set(xscale="log", yscale="log", xlabel="positions before the token", ylabel="milliseconds a token")
    axis.set_xticks(bench["contexts"], [str(context) for context in bench["contexts"]])
    axis.minorticks_off()
    _plain_ticks(axis)
    _legend(axis, len(labels))
    return figure


def sweep_curves(sweeps: Sequence[Sweep], key: str, measure: Measure) -> Figure:
    """The measure over the values of a key, a line for each configuration; the best of each is marked."""
    figure, axis = axes()
    labels = [one.label for one in sweeps]
    colour, dash = colours(labels), styles(labels)
    for one in sweeps:
        means = {value: measure.shown(float(np.mean(of_runs))) for value, of_runs in one.points}
        for value, of_runs in one.points:
            axis.plot([value] * len(of_runs), [measure.shown(v) for v in of_runs], ".", color=colour[one.label], ms=3)
        axis.plot(list(means), list(means.values()), dash[one.label], color=colour[one.label], lw=1.2, label=one.label)
        axis.plot([one.best], [means[one.best]], "o", color=colour[one.label], markersize=6)
    axis.set(xscale="log", xlabel=key, ylabel=measure.name if measure.lower_is_better else f"{measure.name} (%)")
    if measure.lower_is_better:
        axis.set_yscale("log")
        _plain_ticks(axis)
    _legend(axis, len(labels))
    return figure


def axes(width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.3)
    return figure, axis


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(LogLocator(subs=()))


def _legend(axis: Any, entries: int) -> None:
    """Beside the lines where there are many, so that it hides none."""
    if entries > 6:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axis.legend(fontsize=8, frameon=False)
