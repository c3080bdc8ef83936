"""`deconstruct draw`: pictures of runs. Needs matplotlib, the extra `plot`.

deconstruct draw maps --workdir=runs/a --text="for key in keys:" --output=maps.png
deconstruct draw maps --workdir=runs/a --workdir=runs/b --layer=2 --text="for key in keys:" --output=maps.png
deconstruct draw curves --workdir=runs/a --workdir=runs/b --output=curves.png
deconstruct draw perplexity --workdir=runs/a --workdir=runs/original --output=perplexity.png
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from etils import epath

from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.metric_writer import training_losses
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

WHAT = ("maps", "curves", "perplexity")
MAPS_ONLY = ("text", "step", "layer", "head", "columns")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="attention maps over a text, training losses, or evaluations")
    parser.add_argument("--workdir", action="append", required=True, metavar="DIR", help="a run; repeatable")
    parser.add_argument("--output", required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--dpi", type=int, default=150, metavar="N", help="dots an inch of a .png (default 150)")
    parser.add_argument("--text", metavar="TEXT", help="maps: what the models read")
    parser.add_argument("--step", type=int, metavar="N", help="maps: which checkpoint (default: the latest)")
    parser.add_argument("--layer", type=int, metavar="N", help="maps: this layer alone, counted from 1")
    parser.add_argument(
        "--head",
        type=int,
        metavar="N",
        help="maps: this head alone, from 1 (default: of one run all, of several the mean)",
    )
    parser.add_argument("--context", type=int, metavar="N", help="perplexity: at this context (default: the longest)")
    parser.add_argument("--columns", type=int, metavar="N", help="maps: panels side by side (default: heads, or runs)")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    runs = [Workdir(folder) for folder in arguments.workdir]
    names = _names(runs)
    if arguments.what == "maps":
        figure = _maps(runs, names, arguments)
    else:
        figure = _curves(runs, names) if arguments.what == "curves" else _perplexity(runs, names, arguments.context)
    output = epath.Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(output), dpi=arguments.dpi)
    print(f"{output}: {'; '.join(names)}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed; the extra `plot` has it")
    from matplotlib.backend_bases import FigureCanvasBase

    if epath.Path(arguments.output).suffix.removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--output={arguments.output}: expected a name that ends in .png, .svg or .pdf")
    for name in MAPS_ONLY:
        if arguments.what != "maps" and getattr(arguments, name) is not None:
            raise UserError(f"--{name}: only maps have it; leave --{name} out")
    if arguments.what != "perplexity" and arguments.context is not None:
        raise UserError("--context: only perplexity has it; leave --context out")
    if arguments.what == "maps" and not arguments.text:
        raise UserError("--text: maps are drawn over a text; give at least one character")
    for name in ("dpi", "layer", "head", "columns"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)}: must be at least 1")


def _names(runs: list[Workdir]) -> list[str]:
    """What the runs are called: by variant (and layout, of a hybrid), or by folder where two would share a name."""
    configs = [run_dir.read_config() for run_dir in runs]
    names = [c.variant if c.layout == "uniform" else f"{c.variant}, {c.layout}" for c in configs]
    return names if len(set(names)) == len(names) else [run_dir.folder.name for run_dir in runs]


def _curves(runs: list[Workdir], names: list[str]) -> Any:
    from deconstruct.draw.curves import draw_curves

    curves = {}
    for name, run_dir in zip(names, runs, strict=True):
        curves[name] = list(training_losses(run_dir).items())
        if not curves[name]:
            raise UserError(f"--workdir={run_dir.folder}: no step is logged there yet")
    return draw_curves(curves)


def _perplexity(runs: list[Workdir], names: list[str], context: int | None) -> Any:
    """Of what all runs were evaluated on: the validation text, in windows side by side."""
    from deconstruct.draw.curves import draw_perplexity

    found: list[dict[int, dict[int, float]]] = []  # of each run: context -> step -> perplexity
    for run_dir in runs:
        found.append({})
        for r in read_jsonl(run_dir.evaluations):
            if (r["task"], r["metric"]) != ("perplexity", "perplexity") or r["skip"]:
                continue
            if r["text"] == "validation" and r["windows"] == "non-overlapping":
                found[-1].setdefault(r["context"], {})[r["step"]] = r["value"]
        if not found[-1]:
            raise UserError(f"--workdir={run_dir.folder}: no perplexity there yet; `deconstruct evaluate` measures it")
    common = set.intersection(*(set(one) for one in found))
    at = max(common, default=0) if context is None else context
    if at not in common:
        shared = f"all were at {', '.join(map(str, sorted(common)))}" if common else "they share none"
        raise UserError(f"--context={context or ''}: not all runs were evaluated at it; {shared}")
    return draw_perplexity({name: sorted(one[at].items()) for name, one in zip(names, found, strict=True)}, at)


def _maps(runs: list[Workdir], names: list[str], arguments: argparse.Namespace) -> Any:
    from deconstruct.draw.maps import draw_maps, read_maps

    read = [read_maps(run_dir.folder, arguments.text, arguments.step) for run_dir in runs]
    tokens = read[0].tokens
    for run_dir, (own, _) in zip(runs, read, strict=True):
        if own != tokens:
            raise UserError(f"--workdir={run_dir.folder}: its tokenizer cuts the text in another way; draw it alone")
    depth = min(len(maps) for _, maps in read)
    layers = range(depth) if arguments.layer is None else [arguments.layer - 1]
    if layers[-1] >= depth:
        raise UserError(f"--layer={arguments.layer}: there is no such layer; layers are 1 to {depth}")
    rows: list[list[tuple[str, Any]]] = []
    for layer in layers:
        rows.append([])
        for name, (_, maps) in zip(names, read, strict=True):
            rows[-1] += _panels(f"{name}\nlayer {layer + 1}", maps[layer], arguments.head, alone=len(runs) == 1)
    if arguments.columns is not None:
        panels = [panel for row in rows for panel in row]
        rows = [panels[i : i + arguments.columns] for i in range(0, len(panels), arguments.columns)]
    return draw_maps(rows, tokens)


def _panels(title: str, maps: Any, head: int | None, alone: bool) -> list[tuple[str, Any]]:
    """Of one layer of one run: the head that is asked for, else all of them (of a run alone) or their mean."""
    if maps is None:
        return [(title, None)]
    if head is not None:
        if head > len(maps):
            raise UserError(f"--head={head}: there is no such head; heads are 1 to {len(maps)}")
        return [(f"{title}, head {head}", maps[head - 1])]
    if alone:
        return [(f"{title}, head {number}", of_head) for number, of_head in enumerate(maps, 1)]
    return [(f"{title}, mean of heads", maps.mean(0))]
