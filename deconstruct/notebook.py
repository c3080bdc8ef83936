"""Runs from a notebook: what the verbs do, as functions that give back what they found.

They are offered by `deconstruct` itself (`dc.train_run`), and import what they need when they are called.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deconstruct.types import UserError

if TYPE_CHECKING:
    from deconstruct.compare.comparison import Comparison
    from deconstruct.config import Config

Folder = os.PathLike[str] | str


def prepare_text(output: Folder, **options: Any) -> dict[str, Any]:
    """Text as tokenizer and packed rows, as `deconstruct prepare` makes them; the manifest as a dict.

    Options are the verb's (`vocab_size=1024, row_length=256`; `input` is a tuple of files and folders, and without it
    the text is the Python standard library's source), but that `workers` is 1 unless it is given: more are processes
    that run the calling script from its top, which needs an `if __name__ == "__main__":` then. A folder that is
    complete is left as it is. Raises UserError.
    """
    from deconstruct.data.prepare import PrepareOptions, prepare

    unknown = [name for name in options if name not in PrepareOptions.__dataclass_fields__]
    if unknown:
        known = ", ".join(PrepareOptions.__dataclass_fields__)
        raise UserError(f"prepare_text: there is no option {unknown[0]}; options are {known}")
    with contextlib.redirect_stderr(io.StringIO()):  # how far it is; what it found is in the manifest
        return prepare(PrepareOptions(os.fspath(output), **{"workers": 1, **options}))


def train_run(config: Config, workdir: Folder) -> list[tuple[int, float]]:
    """Trains, or resumes, a run to `config.steps`; what it has logged of training on text, as (step, loss in nats a
    token).

    Lines on how far it is come with `logging.basicConfig(level=logging.INFO)`. Raises UserError, FloatingPointError
    and KeyboardInterrupt (after a checkpoint: the same call goes on from it).
    """
    from deconstruct.run.metric_writer import training_losses
    from deconstruct.run.workdir import Workdir
    from deconstruct.train.loop import train

    if train(config, workdir):
        raise KeyboardInterrupt(f"stopped and saved; train_run({os.fspath(workdir)!r}) goes on from there")
    return list(training_losses(Workdir(workdir)).items())


def evaluate_run(
    workdir: Folder, tasks: str = "perplexity", *, step: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Measures a checkpoint (default: the latest) as `deconstruct evaluate` does; the ledger's records of these tasks.

    Options are those of the tasks: `contexts="32,128"`, `sequences=8`. What the ledger holds is not measured again.
    Raises UserError.
    """
    from deconstruct.config import MeshConfig
    from deconstruct.evaluate.evaluation import own_options, parse_tasks
    from deconstruct.evaluate.follower import Evaluator
    from deconstruct.run.workdir import Workdir

    names = parse_tasks(tasks)
    own = own_options(names, argparse.Namespace(**options))
    known = {name for of_task in own.values() for name in vars(of_task)}
    for name in options:
        if name not in known:
            raise UserError(f"evaluate_run: {tasks} has no option {name}; options are {', '.join(sorted(known))}")
    run_dir = Workdir(workdir)
    step = run_dir.step(step)
    with contextlib.closing(Evaluator(run_dir, MeshConfig(fsdp=1), own, quiet=True)) as evaluator:
        evaluator.evaluate_named([step])
        records = [record for one in evaluator.evaluations for record in evaluator.ledger.records(one)]
    return [record for record in records if record["step"] == step]


def compare_runs(
    folders: Folder | Sequence[Folder], *, baseline: str | None = None, match: str = "steps"
) -> list[Comparison]:
    """Groups of runs that differ in more than their seed, against one of them, as `deconstruct compare` has it: one
    comparison for each measure that all runs have. Drawn by `deconstruct.compare.plots`, printed by `.tables`.

    folders: workdirs, or folders of them. baseline: KEY=VALUE,... (default: standard attention). Raises UserError.
    """
    from deconstruct.compare.budgets import BUDGETS, matched
    from deconstruct.compare.command import check_packages
    from deconstruct.compare.groups import find_baseline, grouped, read_runs

    check_packages()
    from deconstruct.compare.comparison import compare, measured

    if match not in BUDGETS:
        raise UserError(f"compare_runs: match={match!r}; expected one of {', '.join(BUDGETS)}")
    given = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    groups = grouped(read_runs([os.fspath(folder) for folder in given]))
    found, measures = measured(groups, matched([run for group in groups for run in group.runs], match))
    base = find_baseline(groups, baseline)
    return [compare(groups, base, found, measure) for measure in measures]
