"""Training curves as a picture: loss or perplexity of several runs over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """A matplotlib figure of `curves`: {name: [(step, loss in nats a token), ...]}, the legend in the order in which
    they end."""
    figure, axis = _axes("training loss (nats a token)")
    for name, points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, linewidth=1.2, label=f"{name}  {losses[-1]:.2f}")
    axis.legend(fontsize=8, frameon=False)
    return figure


def draw_perplexity(curves: Mapping[str, Sequence[tuple[int, float]]], context: int) -> Figure:
    """The same of {name: [(step, perplexity at a context), ...]}. A run of one point alone is a line across: what the
    others are compared with."""
    figure, axis = _axes(f"perplexity (context {context})")
    for name, points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        steps, values = zip(*points, strict=True)
        label = f"{name}  {values[-1]:.2f}"
        if len(points) == 1:
            axis.axhline(values[0], linewidth=1.2, linestyle="--", color="0.4", label=label)
        else:
            axis.plot(steps, values, ".-", linewidth=1.2, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(fontsize=8, frameon=False)
    return figure


def _axes(what: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.add_subplot()
    axis.set_xlabel("step")
    axis.set_ylabel(what)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.3)
    return figure, axis
