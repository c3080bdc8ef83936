"""`deconstruct compare RUNS...`: do configurations differ, by how much, and how sure is that?

deconstruct compare runs/sweep                                         # tables; groups differ in more than their seed
deconstruct compare runs/sweep --baseline=variant=standard --match=flops
deconstruct compare runs/sweep --best-over=learning_rate --output=compared     # each variant at its best rate; pictures
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from deconstruct.compare.budgets import BUDGETS, matched, spent
from deconstruct.compare.groups import Group, find_baseline, grouped, read_runs
from deconstruct.run.metric_writer import training_losses
from deconstruct.types import UserError

if TYPE_CHECKING:
    from deconstruct.compare.best import Sweep
    from deconstruct.compare.comparison import Comparison

PACKAGES = ("scipy", "statsmodels", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or folders of workdirs")
    parser.add_argument(
        "--baseline", metavar="KEY=VALUE,...", help="the group that the others are compared with (default: standard)"
    )
    parser.add_argument(
        "--match",
        default="steps",
        choices=tuple(BUDGETS),
        help="of what all runs have had as much where they are compared (default steps)",
    )
    parser.add_argument(
        "--best-over", metavar="KEY", help="of the values of KEY, such as learning_rate, take each configuration's best"
    )
    parser.add_argument(
        "--bench", metavar="FILE", help="times a token by length, as `deconstruct bench contexts --json` prints them"
    )
    parser.add_argument("--output", metavar="DIR", help="write Markdown, CSV and pictures there as well")


def run(arguments: argparse.Namespace) -> int:
    check_packages()
    from deconstruct.compare import best, comparison, tables

    bench = read_bench(arguments.bench)
    groups = grouped(read_runs(arguments.runs))
    steps = matched([run for group in groups for run in group.runs], arguments.match)
    found, measures = comparison.measured(groups, steps)
    main = main_measure(measures)
    sweeps: list[Sweep] = []
    if arguments.best_over:
        sweeps = best.best_over(arguments.best_over, groups, found, main)
        groups = [sweep.group for sweep in sweeps]
    baseline = find_baseline(groups, arguments.baseline)
    comparisons = [comparison.compare(groups, baseline, found, measure) for measure in measures]
    said = [one for one in comparisons if one.measure == main or one.measure.task != "perplexity"]
    parts = [_opening(groups, steps, arguments.match), tables.means(comparisons)]
    if sweeps:
        parts.append(tables.sweeps(sweeps, arguments.best_over, main))
    for one in said if len(groups) > 1 else []:
        unit = "nats a token" if one.measure.lower_is_better else "points of a hundred"
        parts += [f"{one.measure.name}, less {baseline.label} ({unit}):", tables.differences(one)]
    parts += [tables.noise_floor(one) for one in said if one.measure == main]
    text = "\n\n".join(parts)
    print(text)
    if arguments.output:
        pictures = draw(comparisons, main, arguments.match, bench)
        if sweeps:
            from deconstruct.compare.plots import sweep_curves

            pictures["best"] = sweep_curves(sweeps, arguments.best_over, main)
        _write(epath.Path(arguments.output), text, tables.as_csv(comparisons), pictures)
    return 0


def check_packages() -> None:
    """Raises UserError where the extra `compare` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}; pip install 'deconstruct[compare]'")


def read_bench(file: str | None) -> dict[str, Any] | None:
    """What `bench contexts --json` printed, or None. Raises UserError for another file."""
    if file is None:
        return None
    path = epath.Path(file)
    if not path.exists():
        raise UserError(f"--bench={file}: there is no such file")
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "contexts" in found and "variants" in found:
            return found
    raise UserError(f"--bench={file}: holds nothing of `deconstruct bench contexts --json`")


def main_measure(measures: list[Any]) -> Any:
    """Perplexity at the longest context; else the first."""
    plain = [m for m in measures if m.task == "perplexity" and {key for key, _ in m.setting} <= {"context"}]
    return (plain or measures)[-1 if plain else 0]


def draw(comparisons: list[Comparison], main: Any, budget: str, bench: dict[str, Any] | None) -> dict[str, Any]:
    """Figures by name, those there is something to show of."""
    from deconstruct.compare import plots

    own = next(one for one in comparisons if one.measure == main)
    groups = [row.group for row in own.rows]
    figures: dict[str, Any] = {}
    if curves := loss_curves(groups, budget):
        figures["loss"] = plots.loss_curves(curves, budget)
    contexts = [one for one in comparisons if {key for key, _ in one.measure.setting} == {"context"}]
    if len(contexts) > 1:
        figures["perplexity_by_context"] = plots.perplexity_by_context(contexts)
    if len(groups) > 1:
        figures["differences"] = plots.differences(own)
    figures["principle_by_layout"] = plots.principle_by_layout(own, principles(groups))
    if bench is not None:
        figures["time_by_length"] = plots.time_by_length(bench)
    return {name: figure for name, figure in figures.items() if figure is not None}


def loss_curves(groups: list[Group], budget: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each group: where all its runs have logged, in units of the budget (of the first run), and their losses."""
    curves = {}
    for group in groups:
        logged = [training_losses(run.run_dir) for run in group.runs]
        steps = sorted(set.intersection(*(set(one) for one in logged)))
        if steps:
            losses = np.array([[one[step] for step in steps] for one in logged])
            curves[group.label] = (spent(group.runs[0], steps, budget), losses)
    return curves


def principles(groups: list[Group]) -> dict[str, str]:
    """What each variant relaxes, in words; "" for what relaxes nothing, or is defined by code that is not loaded."""
    from deconstruct.attention.variants import find_variant

    found = {}
    for variant in {group.config.variant for group in groups}:
        try:
            classes: Any = find_variant(variant).classes
        except UserError:
            classes = ()
        found[variant] = ", ".join(dict.fromkeys(principle for cls in classes for principle in cls.relaxes))
    return found


def _opening(groups: list[Group], steps: dict[str, int], budget: str) -> str:
    runs = sum(len(group.runs) for group in groups)
    counts = sorted({step for name, step in steps.items()})
    at = f"step {counts[0]:,}" if len(counts) == 1 else f"steps {counts[0]:,} to {counts[-1]:,}"
    keys = ", ".join(groups[0].values) or "nothing but the seed"
    return (
        f"{runs} runs in {len(groups)} groups, which differ in {keys}; at {at}, matched by {budget} "
        f"({BUDGETS[budget]})."
    )


def _write(folder: epath.Path, text: str, csv: str, pictures: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shown = "".join(f"\n![{name.replace('_', ' ')}]({name}.png)\n" for name in pictures)
    (folder / "comparison.md").write_text(f"# Comparison\n\n{text}\n{shown}")
    (folder / "comparison.csv").write_text(csv)
    for name, figure in pictures.items():
        figure.savefig(str(folder / f"{name}.png"), dpi=150)
    print(f"\n{folder}: comparison.md, comparison.csv, {', '.join(f'{name}.png' for name in pictures)}")
