"""The tasks of lm-evaluation-harness, by its own definitions: prompts, answers, metrics and standard errors are its.

arc_easy, boolq, copa, piqa, sciq, rte, hellaswag, wikitext and lambada_openai, zero-shot, as in arXiv:2510.11602. Data
come from the Hugging Face hub, or from DIR/TASK/SPLIT.jsonl (`--task-data=DIR`) in the columns that the hub has.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from deconstruct.evaluate import texts
from deconstruct.evaluate.evaluation import Evaluation, Measurement, Setting, Subject
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError

# Task -> where the harness defines it, and the splits that it may be measured on, best first.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "arc_easy": ("arc/arc_easy.yaml", ("test", "validation")),
    "boolq": ("super_glue/boolq/default.yaml", ("validation",)),
    "copa": ("super_glue/copa/default.yaml", ("validation",)),
    "piqa": ("piqa/piqa.yaml", ("validation",)),
    "sciq": ("sciq/sciq.yaml", ("test", "validation")),
    "rte": ("glue/rte/default.yaml", ("validation",)),
    "hellaswag": ("hellaswag/hellaswag.yaml", ("validation",)),
    "wikitext": ("wikitext/wikitext.yaml", ("test", "validation")),
    "lambada_openai": ("lambada/lambada_openai.yaml", ("test",)),
}
RESAMPLES = 1000  # for the standard errors that have no closed form


class Harness(Evaluation):
    """Every metric of a task, with its standard error where the harness has one; what each item gave is kept."""

    options: ClassVar[dict[str, dict[str, Any]]] = {
        "--task-data": {
            "metavar": "DIR",
            "help": "read TASK/validation.jsonl or TASK/test.jsonl in this folder (default: the Hugging Face hub)",
        },
        "--limit": {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "only the first N items of a task (default: all)",
        },
    }
    qualifiers: ClassVar[dict[str, Any]] = {"data": None, "limit": 0}

    @classmethod
    def check(cls, options: argparse.Namespace) -> None:
        if options.limit < 0:
            raise UserError(f"--limit={options.limit}: must not be negative; 0 takes all")
        if options.task_data and not Path(options.task_data).is_dir():
            raise UserError(f"--task-data={options.task_data}: there is no such folder")

    def __init__(self, name: str, subject: Subject, options: argparse.Namespace):
        super().__init__(name, subject, options)
        self._task, self._split = _load(name, options.task_data)
        self.last = list(self._task.aggregation())[-1]
        digest = hashlib.sha256()
        for document in self._task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True).encode() + b"\n")
        self._setting = {"data": digest.hexdigest()[:12], "limit": options.limit}
        self._model = _model_of(subject)

    def settings(self) -> list[Setting]:
        return [self._setting]

    def measure(self, model: LanguageModel, setting: Setting) -> Iterator[Measurement]:
        from lm_eval.evaluator import evaluate

        self._model.model = model
        # The harness would fork processes for its bootstrap, and a fork copies the locks of JAX's threads.
        os.environ["DISABLE_MULTIPROC"] = "1"
        results = evaluate(
            lm=self._model,
            task_dict={"tasks": {self.name: self._task}, "groups": {}, "group_map": {}},
            limit=setting["limit"] or None,
            bootstrap_iters=RESAMPLES,
        )
        samples, found = results["samples"][self.name], results["results"][self.name]
        items = [_item(sample) for sample in samples]
        facts = {"items": len(items), "split": self._split, "harness": metadata.version("lm_eval")}
        facts["task_version"] = self._task.VERSION
        for metric in self._task.aggregation():
            stderr = found.get(f"{metric}_stderr,none")
            extras = {"stderr": stderr if isinstance(stderr, float) else None, **facts}
            yield Measurement(metric, float(found[f"{metric},none"]), extras, items if metric == self.last else ())


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    """What an item gave: its number, the log-likelihoods (nats) of its answers or text, and each metric of its own,
    such as acc: 1 or 0."""
    answers = [answer[0] if isinstance(answer, tuple | list) else answer for answer in sample["filtered_resps"]]
    return {"id": sample["doc_id"], "logliks": answers, **{metric: sample[metric] for metric in sample["metrics"]}}


@functools.cache
def _model_of(subject: Subject) -> Any:
    """One for all tasks, so that a program is compiled once."""
    from deconstruct.evaluate.harness_model import HarnessModel

    text, vocabulary = texts.tokenizer_of(subject), subject.config.model.vocab_size
    if text.vocab_size > vocabulary:
        raise UserError(
            f"--workdir={subject.run_dir.folder}: its tokenizer has {text.vocab_size} ids, and the model {vocabulary}"
        )
    return HarnessModel(text, subject.config.sequence_length, subject.mesh)


def _load(name: str, folder: str | None) -> tuple[Any, str]:
    """The harness's task with its data, and the split that is measured."""
    try:
        import datasets
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks={name}: needs the extra eval ({error.name}): pip install 'deconstruct[eval]'"
        ) from None
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells at length which defaults its own tasks take
    path, splits = TASKS[name]
    definition = Path(lm_eval.__file__).parent / "tasks" / path
    manager = TaskManager(include_defaults=False)
    try:
        if folder is None:
            task = manager.load(str(definition))["tasks"][name]
            return task, "test" if task.has_test_docs() else "validation"
        files = {split: Path(folder) / name / f"{split}.jsonl" for split in splits}
        split = next((split for split in splits if files[split].is_file()), None)
        if split is None:
            wanted = " or ".join(str(file) for file in files.values())
            raise UserError(f"--task-data={folder}: {name} needs {wanted}, in the columns of the task on the hub")
        with tempfile.TemporaryDirectory() as made:
            own = Path(made) / f"{name}.yaml"
            own.write_text(json.dumps(_from_files(name, definition, split, files[split])))  # JSON is YAML
            return manager.load(str(own))["tasks"][name], split
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds for no network, another column, a broken line
        where = f"--task-data={folder}: " if folder else ""
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "" if folder else "; --task-data=DIR reads files instead"
        raise UserError(f"{where}{name} cannot be loaded: {type(error).__name__}: {why}{remedy}") from error


def _from_files(name: str, definition: Path, split: str, file: Path) -> dict[str, Any]:
    """The harness's definition with other data."""
    return {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.resolve())}},
        "training_split": None,
        "validation_split": "validation" if split == "validation" else None,
        "test_split": "test" if split == "test" else None,
    }
