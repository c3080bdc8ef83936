"""The paper's figures, of one's own runs, as far as there is something to draw: losses, context, differences,
principle by layout, indicators, logits, costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deconstruct.compare import plots
from deconstruct.compare.command import loss_curves, principles
from deconstruct.compare.comparison import Comparison
from deconstruct.config import ModelConfig
from deconstruct.costs import accounting
from deconstruct.costs.paper import PAPER_COSTS, without_formulas
from deconstruct.report.recall import Recall, state_bytes
from deconstruct.report.study import RATE, Family

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (128, 512, 2048, 8192, 32768)
# Spokes of the radar, clockwise: metric -> how it is drawn. The first three are scaled over the layers of a model.
SCALED = ("entropy", "concentration", "head_diversity")
ABSOLUTE = {"sink": 1.0, "focus_0": 2.0, "focus_1": 2.0, "focus_2": 2.0, "focus_3": 2.0}


class Picture(NamedTuple):
    """`panels`: (what it is of, the figure); several stand side by side where there is room."""

    name: str
    title: str
    caption: str
    panels: list[tuple[str, Figure]]


def pictures(family: Family, bench: dict[str, Any] | None) -> list[Picture]:
    found = [_losses(family), *_of_comparisons(family), _indicators(family), _logits(family), _costs(family)]
    if bench is not None:
        what = "Measured: greedy decoding of one sequence, every layer of one variant."
        found.append(Picture("time", "Time of a decoded token by length", what, [("", plots.time_by_length(bench))]))
    return [picture for picture in found if picture is not None and picture.panels]


def recall_pictures(found: Recall) -> list[Picture]:
    sizes = {group.label: state_bytes(group) for group in found.groups}
    caption = "A dot a seed, the large one their mean. What decoding keeps of a document: all layers, 16 bit."
    panels = [("", plots.value_by_state(found.accuracy, sizes))]
    pictures = [Picture("recall", "Recall by the size of the state", caption, panels)]
    if curves := loss_curves(found.groups, "steps"):
        caption = (
            "The mean over seeds; the band is the least and the most. It counts words that nothing foretells, too."
        )
        pictures.append(Picture("losses", "Training loss", caption, [("", plots.loss_curves(curves, "steps"))]))
    return pictures


def _losses(family: Family) -> Picture:
    panels = []
    for what, layouts in (("uniform", {"uniform"}), ("hybrid", {"even"})):
        cells = [c for c in family.groups if c[1] in layouts or c[0] == "standard"]
        curves = loss_curves([family.groups[cell] for cell in cells], "steps")
        if len(cells) > (what == "hybrid") and curves:
            panels.append((what, plots.loss_curves(curves, "steps")))
    caption = "Training loss, the mean over seeds; the band is the least and the most of them."
    return Picture("losses", "Training loss", caption, panels)


def _of_comparisons(family: Family) -> list[Picture]:
    main = family.main()
    one = family.comparison(main) if main else None
    if main is None or one is None:
        return []
    compared = [family.comparison(m) for m in family.perplexities() if len(family.having(m)) == len(one.rows)]
    contexts = [each for each in compared if each is not None]
    found = []
    if len(contexts) > 1:
        panels = []
        for what, layout in (("uniform", "uniform"), ("hybrid", "even")):
            rows = [_only(each, layout) for each in contexts]
            if len(rows[0].rows) > 1:
                panels.append((what, plots.perplexity_by_context(rows)))
        caption = "On the validation text; bars are the least and the most of the seeds."
        found.append(Picture("contexts", "Perplexity by context length", caption, panels))
    if len(one.rows) > 1:
        caption = f"{main.name}. Left of the line is better than standard attention."
        found.append(
            Picture("differences", "Differences from standard attention", caption, [("", plots.differences(one))])
        )
    heat = plots.principle_by_layout(one, principles([row.group for row in one.rows]))
    if heat is not None:
        caption = (
            "Mean over seeds. Blue is better than standard attention, red is worse, as the root of the difference."
        )
        found.append(Picture("layouts", "Principle by layout", caption, [("", heat)]))
    if family.sweeps:
        caption = "The filled dot is the best of each, which all else on this page is of."
        panel = plots.sweep_curves(family.sweeps, RATE, main)
        found.append(Picture("rates", "Learning rates", caption, [("", panel)]))
    return found


def _only(one: Comparison, layout: str) -> Comparison:
    return one._replace(rows=[row for row in one.rows if row.group.config.layout == layout or row.difference is None])


def _by_layer(family: Family, run: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Metric -> layer -> its record."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in family.records[run]:
        if record["task"] == "indicators" and "layer" in record and not record.get("skip"):
            found.setdefault(record["metric"], {})[record["layer"]] = record
    return found


def _indicators(family: Family) -> Picture:
    panels = []
    for group in family.groups.values():
        by_layer = _by_layer(family, group.runs[0].name)
        if {*SCALED, *ABSOLUTE} <= by_layer.keys():
            panels.append((group.label, _radar(group.label, by_layer)))
    caption = (
        "A line a layer, from light (first) to dark (last); one seed each. Entropy, concentration and head diversity "
        "are scaled from 0 to 1 over the layers; sink and local focus (drawn twice as long) are weights."
    )
    return Picture("indicators", "What attention does, layer by layer", caption, panels)


def _radar(title: str, by_layer: dict[str, dict[int, dict[str, Any]]]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    spokes = [*SCALED, *ABSOLUTE]
    layers = sorted(by_layer[spokes[0]])
    rows = []
    for spoke in spokes:
        values = np.array([by_layer[spoke][layer]["value"] for layer in layers])
        if spoke in SCALED:
            values = (values - values.min()) / (np.ptp(values) or 1.0)
        rows.append(np.clip(values * ABSOLUTE.get(spoke, 1.0), 0, 1))
    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    axis: Any = figure.add_subplot(projection="polar")
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 0.9, len(layers)))
    for shade, values in zip(shades, np.array(rows).T, strict=True):
        axis.plot(np.append(angles, 0.0), np.append(values, values[0]), color=shade, linewidth=1)
    axis.set_xticks(angles, [spoke.replace("_", "\n") for spoke in spokes], fontsize=7)
    axis.set_yticks([0.5, 1.0], ["", ""])
    axis.set_ylim(0, 1)
    axis.set_title(title, fontsize=9)
    return figure


def _logits(family: Family) -> Picture:
    panels = []
    for group in family.groups.values():
        largest = _by_layer(family, group.runs[0].name).get("logit_largest")
        if largest and all("below" in record for record in largest.values()):
            panels.append((group.label, _quantiles(group.label, largest)))
    caption = (
        "Raw scores before normalisation: the median, the middle half and 98 % of them (from a histogram over powers "
        "of two), and the outermost as dots; one seed each."
    )
    return Picture("logits", "Distribution of logits", caption, panels)


def _quantiles(title: str, records: dict[int, dict[str, Any]]) -> Figure:
    figure, axis = plots.axes(width=3.2, height=2.6)
    layers = sorted(records)
    wanted = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
    found = []
    for layer in layers:
        record = records[layer]
        places = np.concatenate([[record["least"]], record["edges"], [record["greatest"]]])
        below = np.concatenate([[0.0], record["below"], [1.0]])
        inside = (places >= record["least"]) & (places <= record["greatest"])
        found.append(np.interp(wanted, below[inside], places[inside]))
    low, quarter, median, three_quarters, high = np.array(found).T
    axis.fill_between(layers, low, high, color="C0", alpha=0.2, linewidth=0)
    axis.fill_between(layers, quarter, three_quarters, color="C0", alpha=0.4, linewidth=0)
    axis.plot(layers, median, "o-", color="C0", markersize=2, linewidth=1)
    for end in ("least", "greatest"):
        axis.plot(layers, [records[layer][end] for layer in layers], ".", color="C3", markersize=4)
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_xlabel("layer", fontsize=8)
    axis.set_xticks(layers if len(layers) < 9 else layers[:: len(layers) // 6])
    axis.set_title(title, fontsize=9)
    return figure


def _costs(family: Family) -> Picture:
    """One layer of each variant that has runs, at the shape of the runs."""
    model = family.config.model
    variants = list(dict.fromkeys(cell[0] for cell in family.groups))
    panels = []
    costs: tuple[tuple[str, str, Callable[[ModelConfig, int, int], Sequence[float]], str], ...] = (
        ("a prompt", "FLOPs a token of the prompt", _prefill, "prefill"),
        ("one more token", "FLOPs", _decode, "decode"),
        ("the cache", "bytes, 16 bit", accounting.layer_cache_bytes, "cache"),
    )
    for what, unit, ours, key in costs:
        figure, axis = plots.axes(width=4.2, height=3.2)
        colour = plots.colours(variants)
        for variant in variants:
            config = dataclasses.replace(
                model, layers=(variant,), num_layers=1, fixed_length=LENGTHS[-1], dtype="bfloat16"
            )
            numbers = [ours(config, 1, length)[0] for length in LENGTHS]
            axis.plot(LENGTHS, numbers, "o-", color=colour[variant], markersize=3, linewidth=1.2, label=variant)
            if variant in PAPER_COSTS and not without_formulas(model):
                formula = getattr(PAPER_COSTS[variant], key)
                printed = [formula(1, length, model.hidden_size, model.num_heads) for length in LENGTHS]
                printed = [
                    value / length if key == "prefill" else value
                    for value, length in zip(printed, LENGTHS, strict=True)
                ]
                axis.plot(LENGTHS, printed, ":", color=colour[variant], linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="positions", title=f"{what}: {unit}")
        axis.title.set_fontsize(9)
        axis.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], fontsize=7)
        axis.minorticks_off()
        axis.legend(fontsize=6, frameon=False)
        panels.append((what, figure))
    caption = (
        "One layer, one sequence: what is needed (solid; mixer and MLP in FLOPs) and the paper's formulas for the "
        "mixer (dotted). What programs really do: `deconstruct describe --costs`."
    )
    return Picture("costs", "Costs of a layer by length", caption, panels)


def _decode(config: ModelConfig, batch: int, length: int) -> list[float]:
    return [flops.needed for flops in accounting.layer_decode_flops(config, batch, length)]


def _prefill(config: ModelConfig, batch: int, length: int) -> list[float]:
    return [flops.needed / length for flops in accounting.layer_forward_flops(config, batch, length)]
