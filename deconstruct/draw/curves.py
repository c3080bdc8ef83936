"""Training curves as a picture: the loss of several runs over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """A matplotlib figure of `curves`: {name: [(step, loss in nats a token), ...]}, the legend in the order in which
    they end."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, linewidth=1.2, label=f"{name}  {losses[-1]:.2f}")
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats a token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure
