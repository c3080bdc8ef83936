"""The roofline of a run of `bench kernels` as a picture: each program's FLOP/s over its FLOPs a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deconstruct.bench.ceilings import Ceilings
from deconstruct.types import UserError


def draw_roofline(found: dict[str, Any], path: Path) -> None:
    """Writes an image (.png or .svg): one panel for each pass, a line for each program from its shortest sequences to
    its longest. Raises UserError without matplotlib."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'deconstruct[plot]'") from error
    ceilings = Ceilings(**found["ceilings"])
    rows = [row for row in found["rows"] if "flops" in row]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(6 * len(passes), 4.8), layout="constrained")
    axes = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    for axis, way in zip(axes, passes, strict=True):
        shown = [row for row in rows if row["pass"] == way]
        for label in dict.fromkeys(row["program"] for row in shown):
            points = [row for row in shown if row["program"] == label]
            intensity = [row["flops"] / row["bytes"] for row in points]
            rate = [row["flops"] / row["milliseconds"] * 1e3 for row in points]
            axis.plot(intensity, rate, "o-", markersize=4, linewidth=1, label=label)
        reach = [row["flops"] / row["bytes"] for row in shown]
        ridge = ceilings.flops / ceilings.bytes
        span = [min([*reach, ridge]) / 2, ridge, max([*reach, ridge]) * 2]
        axis.plot(span, [min(x * ceilings.bytes, ceilings.flops) for x in span], "k--", linewidth=1, label="at most")
        axis.set(xscale="log", yscale="log", title=way, xlabel="FLOPs needed per byte that must move")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FLOP/s")
    axes[-1].legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{found['device']}, {found['work']['dtype']}, heads of {found['work']['head_dim']}")
    figure.savefig(path, dpi=130)
