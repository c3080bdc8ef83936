"""The seam between the evaluator and what it measures: the class of an evaluation, and the table of them by name.

The follower, the ledger and the verb `evaluate` know what stands here and nothing else, so an evaluation is one file
with a subclass of `Evaluation`, and one line in `EVALUATIONS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from deconstruct.config import Config
from deconstruct.model.language_model import LanguageModel
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

# The harness's own names.
HARNESS_TASKS = ("arc_easy", "boolq", "copa", "piqa", "sciq", "rte", "hellaswag", "wikitext", "lambada_openai")
# Task -> where its class is, "module:class". Several tasks may share one. They are imported when `evaluate` is called,
# to know their options; what is heavy or optional should be imported when it is used.
EVALUATIONS = {
    "perplexity": "deconstruct.evaluate.perplexity:Perplexity",
    "indicators": "deconstruct.evaluate.indicators:Indicators",
    "recall": "deconstruct.evaluate.recall:RecallAccuracy",
    **dict.fromkeys(HARNESS_TASKS, "deconstruct.evaluate.harness:Harness"),
}

Setting = dict[str, Any]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The run whose checkpoints are evaluated, and the devices to do it on. Nothing of it is one checkpoint's."""

    run_dir: Workdir
    config: Config
    mesh: jax.sharding.Mesh


class Measurement(NamedTuple):
    """A number. `extras` go into its record as well: facts (tokens), and what qualifies this number within the setting
    (a layer), under names that are among the evaluation's `qualifiers`. `items`: what each item (a question, a
    document) gave, as JSON objects; they are kept in a file beside the ledger, and the record names it."""

    metric: str
    value: float
    extras: Mapping[str, Any] = {}
    items: Sequence[Mapping[str, Any]] = ()


class Evaluation:
    """Measures models. One object serves all checkpoints of a run, so it may keep data and compiled programs.

    options: command-line option -> the arguments of argparse's `add_argument`. Evaluations may share an option, which
    they then declare alike. The user may give an option only where an evaluation that has it is asked for.
    qualifiers: what makes a record its own, besides step, task, metric and `skip` -> the value that goes without saying
    in the name of a curve. Values are those of JSON: strings, numbers, booleans, None.
    last: the metric that ends a setting, once: where it stands in the ledger, the setting is complete.
    """

    options: ClassVar[dict[str, dict[str, Any]]] = {}
    qualifiers: ClassVar[dict[str, Any]] = {}
    last: str

    @classmethod
    def check(cls, options: argparse.Namespace) -> None:
        """Raises UserError for what is wrong in the options whatever the run is; it may not have begun."""

    def __init__(self, name: str, subject: Subject, options: argparse.Namespace):
        """`name`: the task. `options`: this evaluation's own, with defaults filled in. Raises UserError for what does
        not suit the run, before a checkpoint is read."""
        self.name, self.subject = name, subject

    def settings(self) -> list[Setting]:
        """What is measured on each checkpoint: the qualifiers of each measurement, in order."""
        return [{}]

    def measure(self, model: LanguageModel, setting: Setting) -> Iterable[Measurement]:
        """Called inside `jax.set_mesh` of the subject's mesh, on which the model's parameters are."""
        raise NotImplementedError

    def line(self, records: list[Record]) -> str:
        """The records of one setting, for the terminal."""
        values = "  ".join(f"{record['metric']} {record['value']:.6g}" for record in records)
        said = ", ".join(f"{key} {value}" for key, value in self._said(records[-1]).items())
        return f"{self.name}  {values}" + (f"  ({said})" if said else "")

    def curve(self, record: Record) -> str:
        """The name of the curve that a record is a point of: task/metric/qualifiers."""
        return "/".join([self.name, record["metric"], *(f"{k}_{v}" for k, v in self._said(record).items())])

    def _said(self, record: Record) -> dict[str, Any]:
        """The qualifiers of a record that do not go without saying."""
        plain = {**self.qualifiers, "skip": ""}
        return {key: record[key] for key, usual in plain.items() if key in record and record[key] != usual}


def parse_tasks(text: str) -> list[str]:
    """The tasks of `--tasks=a,b`. Raises UserError for one that is not there."""
    tasks = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    for task in tasks:
        if task not in EVALUATIONS:
            (nearest,) = difflib.get_close_matches(task, EVALUATIONS, n=1, cutoff=0)
            raise UserError(f"--tasks={text}: {task!r} is unknown; did you mean {nearest}?")
    if not tasks:
        raise UserError(f"--tasks={text}: expected names, such as {','.join(EVALUATIONS)}")
    return tasks


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of every evaluation; those not given leave no trace in what is parsed."""
    declared: dict[str, dict[str, Any]] = {}
    for task in EVALUATIONS:
        own = _load(task).options
        group = parser.add_argument_group(f"options of {task}") if own.keys() - declared.keys() else None
        for option, keywords in own.items():
            if group and option not in declared:
                group.add_argument(option, **{**keywords, "default": argparse.SUPPRESS})
            elif declared[option] != keywords:
                raise ValueError(f"{option} of {task} is declared otherwise by another evaluation")
            declared[option] = keywords


def own_options(tasks: list[str], parsed: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The options of each task asked for. Raises UserError for one that was given and belongs to none of them."""
    given = vars(parsed)
    known = {option for task in tasks for option in _load(task).options}
    for task in EVALUATIONS:
        for option in _load(task).options:
            if _destination(option) in given and option not in known:
                raise UserError(f"{option} is an option of {task}, which --tasks={','.join(tasks)} does not ask for")
    options = {}
    for task in tasks:
        declared = _load(task).options
        names = {_destination(option): keywords.get("default") for option, keywords in declared.items()}
        options[task] = argparse.Namespace(**{name: given.get(name, default) for name, default in names.items()})
        _load(task).check(options[task])
    return options


def qualifiers_of(task: str) -> dict[str, Any] | None:
    """Those of a task's records, `skip` among them, with the value that goes without saying. None where no such task is
    known here."""
    return {**_load(task).qualifiers, "skip": ""} if task in EVALUATIONS else None


def make_evaluation(task: str, subject: Subject, options: argparse.Namespace) -> Evaluation:
    return _load(task)(task, subject, options)


def _load(task: str) -> type[Evaluation]:
    module, _, name = EVALUATIONS[task].partition(":")
    return getattr(importlib.import_module(module), name)


def _destination(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
