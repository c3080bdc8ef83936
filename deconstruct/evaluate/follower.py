"""`deconstruct evaluate`: a process of its own that reads a workdir's finished checkpoints and adds to its ledger.

Which steps, in which order; what is measured on each is the evaluations' (`evaluation.py`), and what is still missing
the ledger's.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator

import jax

from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh, parse_mesh
from deconstruct.evaluate.curves import Curves
from deconstruct.evaluate.evaluation import Subject, add_options, make_evaluation, own_options, parse_tasks
from deconstruct.evaluate.ledger import Ledger
from deconstruct.model.placement import mesh_for
from deconstruct.run import checkpoint, extensions
from deconstruct.run.checkpoint import CheckpointGoneError
from deconstruct.run.restore import Skip, restore_model, skipped
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

ALL = "all"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--tasks", default="perplexity", metavar="A,B,...", help="what is measured (default: perplexity)"
    )
    parser.add_argument(
        "--step", metavar="N,M,...", help="which checkpoints; all takes every one there is (default: the latest)"
    )
    parser.add_argument(
        "--follow", action="store_true", help="evaluate every checkpoint as it appears, until the run's last step"
    )
    parser.add_argument(
        "--skip",
        nargs="?",
        const="block",
        default="",
        choices=("block", "mixer"),
        help="leave out the layers that are not standard, or only their mixers",
    )
    parser.add_argument(
        "--mesh",
        default="fsdp=1",
        metavar="AXIS=N,...",
        help="how all devices here share the work, as in fsdp=4,tensor=2 (default: each takes a part of a batch)",
    )
    parser.add_argument(
        "--poll", type=float, default=5.0, metavar="SECONDS", help="how often --follow looks (default 5)"
    )
    extensions.add_arguments(parser)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.follow and arguments.step is not None:
        raise UserError("--follow evaluates every step; leave --step out")
    if not arguments.poll > 0:
        raise UserError(f"--poll={arguments.poll}: must be positive")
    steps = parse_steps(arguments.step)
    options = own_options(parse_tasks(arguments.tasks), arguments)
    mesh = parse_mesh(arguments.mesh)
    make_mesh(mesh, key="--mesh")  # what these devices cannot make is refused before there is a run to wait for
    run_dir = Workdir(arguments.workdir)
    while arguments.follow and not run_dir.config_file.exists():
        time.sleep(arguments.poll)  # the trainer has not begun yet
    trust = extensions.trust(arguments)
    with contextlib.closing(Evaluator(run_dir, mesh, options, arguments.skip, trust)) as evaluator:
        if arguments.follow:
            evaluator.evaluate_existing(follow(run_dir, arguments.poll))
        elif arguments.step == ALL:
            run_dir.step(None)  # says so where there is none
            evaluator.evaluate_existing(checkpoint.finished_steps(run_dir.checkpoints))
        else:
            evaluator.evaluate_named(steps or [run_dir.step(None)])
    return 0


class Evaluator:
    """What one call of `evaluate` measures on each checkpoint."""

    def __init__(
        self,
        run_dir: Workdir,
        mesh: MeshConfig,
        options: dict[str, argparse.Namespace],
        skip: Skip = "",
        trust: extensions.Trust = extensions.NOTHING,
        quiet: bool = False,
    ):
        """`options`: of each task. `trust`: what code of the run's own may be run. `quiet`: nothing is printed."""
        config = run_dir.read_config()
        extensions.load(run_dir, config, trust)
        skipped(config.model, skip)  # refuses what cannot be skipped before anything is loaded
        self.run_dir, self.skip, self.quiet = run_dir, skip, quiet
        self.mesh = mesh_for(config.model, mesh, key="--mesh")
        subject = Subject(run_dir, config, self.mesh)
        self.evaluations = [make_evaluation(task, subject, own) for task, own in options.items()]
        self.ledger = Ledger(run_dir.evaluations, skip)
        self.curves = Curves(run_dir.folder / "tensorboard" / "eval")
        for evaluation in self.evaluations:  # what an earlier process did not come to tell TensorBoard
            self.curves.add(evaluation, self.ledger.records(evaluation))

    def evaluate_existing(self, steps: Iterable[int]) -> None:
        """Each step that is still there when its turn comes."""
        for step in steps:
            try:
                self.evaluate(step)
            except CheckpointGoneError as gone:
                log.info("step %d was deleted before it could be evaluated: %s", step, gone)

    def evaluate_named(self, steps: list[int]) -> None:
        """Each step; before the first is measured, raises CheckpointGoneError for one that is needed and not there."""
        for step in steps:
            if any(self.ledger.missing(step, evaluation) for evaluation in self.evaluations):
                checkpoint.read_meta(self.run_dir.checkpoints, step)
        for step in steps:
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Measures what the ledger does not hold yet of `step`, and adds it."""
        missing = [(e, setting) for e in self.evaluations for setting in self.ledger.missing(step, e)]
        if not missing:
            log.info("step %d: everything asked for is in %s already", step, self.ledger.path)
            return
        model = restore_model(self.run_dir.folder, step, skip=self.skip, mesh=self.mesh)
        for evaluation, setting in missing:
            with jax.set_mesh(self.mesh):
                found = list(evaluation.measure(model, setting))
            records = self.ledger.add(step, evaluation, setting, found)
            self.curves.add(evaluation, records)
            if not self.quiet:
                print(f"step {step}  {evaluation.line(records)}", flush=True)

    def close(self) -> None:
        self.curves.close()


def follow(run_dir: Workdir, poll: float) -> Iterator[int]:
    """Each finished step once, oldest first, until the run's last."""
    seen: set[int] = set()
    while True:
        fresh = [step for step in checkpoint.finished_steps(run_dir.checkpoints) if step not in seen]
        for step in fresh:
            seen.add(step)
            yield step
            if step >= run_dir.read_config().steps:
                return
        if not fresh:
            time.sleep(poll)


def parse_steps(text: str | None) -> list[int]:
    """The steps of `--step=200,400`, ascending; none where it is not given, or `all`."""
    if text is None or text == ALL:
        return []
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isdecimal() for entry in entries):
        raise UserError(f"--step={text}: expected steps, such as 200 or 200,400, or {ALL}")
    return sorted({int(entry) for entry in entries})
