"""recall: how much of what only the text before it can tell a model knows, on documents made for it (`data/recall`)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from deconstruct.data.manifest import load_manifest
from deconstruct.data.recall import PREFIX, Recall, parse_recall
from deconstruct.evaluate import texts
from deconstruct.evaluate.evaluation import Evaluation, Measurement, Setting, Subject
from deconstruct.evaluate.token_scores import TokenScores
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError

OWN, DOCUMENTS = "own", 512


class RecallAccuracy(Evaluation):
    """accuracy: the share of answers that get the greatest logit; accuracy_at_first: of those to a key that stood there
    once; nll: nats an answer. Of documents that are drawn anew, of the run's own difficulty or another."""

    options: ClassVar[dict[str, dict[str, Any]]] = {
        "--recall": {"metavar": "KIND", "help": "such as 'mqar(pairs=16,length=127)' (default: as in the run's data)"},
        "--documents": {
            "type": int,
            "default": DOCUMENTS,
            "metavar": "N",
            "help": f"how many to draw (default {DOCUMENTS})",
        },
        "--data": texts.OPTIONS["--data"],
    }
    qualifiers: ClassVar[dict[str, Any]] = {"recall": OWN, "documents": DOCUMENTS}
    last = "accuracy"

    @classmethod
    def check(cls, options: argparse.Namespace) -> None:
        if options.documents < 1:
            raise UserError(f"--documents={options.documents}: must be at least 1")
        if options.recall:
            parse_recall(options.recall.partition("(")[0])

    def __init__(self, name: str, subject: Subject, options: argparse.Namespace):
        super().__init__(name, subject, options)
        own = _of_data(options.data or subject.config.data)
        self._recall = parse_recall(options.recall, own) if options.recall else own
        if self._recall.words() != own.words():
            raise UserError(
                f"--recall={options.recall}: keys, values and fillers are words of the vocabulary, and this model has "
                f"those of {own.spelled()}; leave them out"
            )
        self._tokens = self._recall.tokens(options.documents, stream=1)  # prepare draws from stream 0
        spelled = self._recall.spelled() if options.recall else OWN
        self._settings = [{"recall": spelled, "documents": options.documents}]
        self._scores = TokenScores(subject.mesh)

    def settings(self) -> list[Setting]:
        return self._settings

    def measure(self, model: LanguageModel, setting: Setting) -> Iterator[Measurement]:
        tokens, targets = self._tokens[:, :-1], self._tokens[:, 1:]
        model.check_length(tokens.shape[1], f"documents of {self._tokens.shape[1]} words (--recall)")
        before = self._recall.answers(tokens)
        scores = self._scores(model, tokens, targets)
        facts = {"answers": int((before > 0).sum()), "kind": self._recall.spelled()}
        yield Measurement("nll", -float(scores.logliks[before > 0].mean(dtype=np.float64)), facts)
        yield Measurement("accuracy_at_first", float(scores.chosen[before == 1].mean()), facts)
        yield Measurement("accuracy", float(scores.chosen[before > 0].mean()), facts)


def _of_data(data: str) -> Recall:
    """The difficulty of prepared data. Raises UserError for data that is not made for recall."""
    inputs = load_manifest(data).options["input"] if data else []
    if len(inputs) != 1 or not inputs[0].startswith(PREFIX):
        raise UserError(
            f"--tasks=recall: {data or 'no data'} is not made for recall; prepare some with "
            f"--input='{PREFIX}mqar(pairs=8)', and train on it"
        )
    return parse_recall(inputs[0])
