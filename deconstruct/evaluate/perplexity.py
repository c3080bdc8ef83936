"""perplexity: the loss of a model on a text, in windows of several context lengths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from deconstruct.evaluate import texts
from deconstruct.evaluate.evaluation import Evaluation, Measurement, Record, Setting, Subject
from deconstruct.evaluate.window_losses import WindowLosses
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError


class Perplexity(Evaluation):
    """nll (nats a token) and its exponential, perplexity, at each context length, over `tokens` tokens."""

    options: ClassVar[dict[str, dict[str, Any]]] = {
        "--contexts": {
            "metavar": "128,256,...",
            "help": "context lengths in tokens (default: the run's sequence length)",
        },
        **texts.OPTIONS,
        "--windows": {
            "choices": ("non-overlapping", "sliding"),
            "default": "non-overlapping",
            "help": "how the text is cut (default: non-overlapping)",
        },
        "--stride": {"type": int, "metavar": "N", "help": "of sliding windows, in tokens (default: half the context)"},
    }
    qualifiers: ClassVar[dict[str, Any]] = {
        "context": None,
        "windows": "non-overlapping",
        "stride": None,
        **texts.QUALIFIERS,
    }
    last = "perplexity"

    @classmethod
    def check(cls, options: argparse.Namespace) -> None:
        texts.check_options(options)
        for context in _contexts(options.contexts):
            _stride(context, options.windows, options.stride)

    def __init__(self, name: str, subject: Subject, options: argparse.Namespace):
        super().__init__(name, subject, options)
        contexts = _contexts(options.contexts) or [subject.config.sequence_length]
        strides = [_stride(context, options.windows, options.stride) for context in contexts]
        self._stream, text = texts.read_text(subject, options)
        constant = {"text": text, "windows": options.windows, "max_tokens": options.max_tokens}
        self._pieces = texts.pieces(self._stream, texts.end_of_text(subject, options))
        self._settings = [
            {"context": context, "stride": stride, **constant}
            for context, stride in zip(contexts, strides, strict=True)
        ]
        self._losses = WindowLosses(subject.mesh)

    def settings(self) -> list[Setting]:
        return self._settings

    def measure(self, model: LanguageModel, setting: Setting) -> Iterator[Measurement]:
        result = self._losses(model, self._stream, setting["context"], setting["stride"])
        starts, documents = self._pieces
        sums = np.add.reduceat(result.losses, starts, dtype=np.float64)
        counts = np.diff(starts, append=result.tokens)
        items = [
            {"id": document, "logliks": [round(-nll, 4)], "tokens": tokens}
            for document, nll, tokens in zip(documents.tolist(), sums.tolist(), counts.tolist(), strict=True)
        ]
        facts = {"tokens": result.tokens}
        yield Measurement("nll", result.nll, facts)
        yield Measurement("perplexity", result.perplexity, facts, items)

    def line(self, records: list[Record]) -> str:
        nll, perplexity = records
        how = nll["windows"] if nll["windows"] != "sliding" else f"sliding by {nll['stride']}"
        skip = f", skip {nll['skip']}" if nll["skip"] else ""
        return (
            f"context {nll['context']}  perplexity {perplexity['value']:.4f}  nll {nll['value']:.5f}  "
            f"({nll['tokens']:,} tokens of {nll['text']}, {how}{skip})"
        )

    def curve(self, record: Record) -> str:
        if record.get("windows") == "non-overlapping":
            record = {**record, "stride": None}  # is the context
        return super().curve(record)


def _contexts(text: str | None) -> list[int]:
    try:
        contexts = [int(entry) for entry in text.split(",")] if text else []
    except ValueError:
        contexts = [0]
    if any(context < 1 for context in contexts):
        raise UserError(f"--contexts={text}: expected lengths in tokens, such as 128,256,512")
    return contexts


def _stride(context: int, kind: str, stride: int | None) -> int:
    if kind == "non-overlapping":
        if stride is not None:
            raise UserError(f"--stride={stride}: non-overlapping windows have none; add --windows=sliding")
        return context
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride={stride}: expected 1 to the context, {context}")
    return stride
