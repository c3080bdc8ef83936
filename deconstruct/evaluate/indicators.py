"""indicators: what attention does, layer by layer and head by head, over some sequences of text.

The paper's (arXiv:2510.11602, section 5): entropy, concentration, head diversity, sink, local focus, and the
distribution of logits before normalisation. Beyond it: the rank of maps and which key gets most, how alike the maps of
layers are, massive activations, and the spectrum of W_Q W_K^T. What each is stands in `layer_statistics.py` and
`qk_spectrum.py`. A mixer without a map is named, and only its input is looked at.

One sequence at a time is on a device: a map takes 4 heads L^2 bytes there, and never comes to the host.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from deconstruct.attention.attention import Attention
from deconstruct.evaluate import qk_spectrum, texts
from deconstruct.evaluate.evaluation import Evaluation, Measurement, Record, Setting, Subject
from deconstruct.evaluate.layer_statistics import EDGES, FOCUS, LayerStatistics
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError

SEQUENCES = 16
BY_HEAD = ("entropy", "concentration", "sink", *(f"focus_{n}" for n in FOCUS), "map_rank")
BY_HEAD_LOGITS = ("logit_mean", "logit_std")
Found = dict[str, np.ndarray]  # of a layer: what `layer_statistics` names, a row a sequence


class Indicators(Evaluation):
    """A record a layer (counted from 1) and metric: the mean over sequences and heads, `heads` with each head's own."""

    options: ClassVar[dict[str, dict[str, Any]]] = {
        "--sequences": {
            "type": int,
            "default": SEQUENCES,
            "metavar": "N",
            "help": f"how many sequences of the run's length to look at (default {SEQUENCES})",
        },
        **texts.OPTIONS,
    }
    qualifiers: ClassVar[dict[str, Any]] = {"layer": None, "sequences": SEQUENCES, **texts.QUALIFIERS}
    last = "layers_with_map"

    @classmethod
    def check(cls, options: argparse.Namespace) -> None:
        texts.check_options(options)
        if options.sequences < 1:
            raise UserError(f"--sequences={options.sequences}: must be at least 1")

    def __init__(self, name: str, subject: Subject, options: argparse.Namespace):
        super().__init__(name, subject, options)
        stream, text = texts.read_text(subject, options)
        length = min(subject.config.sequence_length, len(stream))
        if length <= max(FOCUS):
            raise UserError(f"the text has sequences of {length} tokens; indicators need {max(FOCUS) + 1}")
        count = min(options.sequences, len(stream) // length)
        self._tokens = stream[: count * length].reshape(count, length)
        self._settings = [{"sequences": options.sequences, "text": text, "max_tokens": options.max_tokens}]
        self._statistics = LayerStatistics(subject.mesh)

    def settings(self) -> list[Setting]:
        return self._settings

    def measure(self, model: LanguageModel, setting: Setting) -> Iterator[Measurement]:
        layers, alike = self._statistics(model, self._tokens)
        without: dict[str, list[int]] = {}
        mapped = [number for number, found in enumerate(layers) if "entropy" in found]
        for number, found in enumerate(layers):
            for measured in self._of_layer(model, number, found):
                yield measured._replace(extras={"layer": number + 1, **measured.extras})
            if number not in mapped:
                without.setdefault(model.config.layers[number], []).append(number + 1)
            elif len(mapped) > 1:
                row = alike[mapped.index(number)]
                cosines = {str(other + 1): _short(x) for other, x in zip(mapped, row, strict=True)}
                others = np.delete(row, mapped.index(number))
                yield Measurement("map_similarity", float(others.mean()), {"layer": number + 1, "with_layers": cosines})
        facts = {"measured": len(self._tokens), "length": self._tokens.shape[1], "without_map": without}
        yield Measurement("layers_with_map", float(len(mapped)), facts)

    def _of_layer(self, model: LanguageModel, number: int, found: Found) -> Iterator[Measurement]:
        yield from _of_activations(found, self._tokens)
        if "entropy" in found:
            yield from (_over_heads(metric, found[metric]) for metric in BY_HEAD)
            yield Measurement("head_diversity", float(found["head_diversity"].mean()))
            yield _of_top_key(found, self._tokens)
        if "logit_mean" in found:
            yield from (_over_heads(metric, found[metric]) for metric in BY_HEAD_LOGITS)
            yield _of_logits(found)
        mixer = model.stack.layer(number).mixer
        if isinstance(mixer, Attention):
            yield from _of_projections(mixer)

    def line(self, records: list[Record]) -> str:
        last = records[-1]

        def span(metric: str) -> str:
            values = [record["value"] for record in records if record["metric"] == metric]
            return f"  {metric} {min(values):.4g} to {max(values):.4g}" if values else ""

        without = "; ".join(f"{name} in {', '.join(map(str, at))}" for name, at in last["without_map"].items())
        said = ", ".join(f"{key} {value}" for key, value in self._said(last).items() if key != "layer")
        return (
            f"{self.name}  {last['value']:.0f} layers with a map{span('entropy')}{span('sink')}{span('logit_largest')}"
            f"  ({last['measured']} sequences of {last['length']} tokens{f'; no map: {without}' if without else ''}"
            f"{f'; {said}' if said else ''})"
        )


def _over_heads(metric: str, values: np.ndarray) -> Measurement:
    return Measurement(metric, float(values.mean()), {"heads": _short(values.mean(0))})


def _of_top_key(found: Found, tokens: np.ndarray) -> Measurement:
    """Which key gets most attention: how often it is the first, and the token that it is most often."""
    values, at = found["top_key"], found["top_position"].astype(int)  # [sequences, heads]
    (token, times), *_ = Counter(np.take_along_axis(tokens, at, axis=1).ravel().tolist()).most_common(1)
    extras = {"at_first": float((at == 0).mean()), "token": token, "token_share": times / at.size}
    return Measurement("top_key", float(values.mean()), {"heads": _short(values.mean(0)), **extras})


def _of_logits(found: Found) -> Measurement:
    """The largest absolute value, and the distribution: the share of scores below each edge."""
    least, greatest = found["logit_least"].min(), found["logit_greatest"].max()
    largest = np.maximum(-found["logit_least"], found["logit_greatest"]).max(0)
    histogram = {"edges": EDGES.tolist(), "below": _short(found["logit_below"].mean(0))}
    extras = {"heads": _short(largest), "least": float(least), "greatest": float(greatest), **histogram}
    return Measurement("logit_largest", float(largest.max()), extras)


def _of_activations(found: Found, tokens: np.ndarray) -> Iterator[Measurement]:
    largest = found["activation_largest"]
    worst = int(np.argmax(largest))
    position, channel = (int(found[f"activation_{of}"][worst]) for of in ("position", "channel"))
    extras = {"position": position + 1, "channel": channel, "token": int(tokens[worst, position])}
    yield Measurement("activation_largest", float(largest.max()), extras)
    yield Measurement("activation_median", float(found["activation_median"].mean()))


def _of_projections(mixer: Attention) -> Iterator[Measurement]:
    """The rank of W_Q W_K^T, its singular values (mean over heads), and the share of its eigenvalues, as large as they
    are, whose real part is positive."""
    w_q, w_k = (np.asarray(projection.kernel[...]) for projection in (mixer.q_proj, mixer.k_proj))
    singular, eigen = qk_spectrum.singular_values(w_q, w_k), qk_spectrum.eigenvalues(w_q, w_k)
    rank = qk_spectrum.effective_rank(singular)
    values = {"heads": _short(rank), "singular_values": _short(singular.mean(0))}
    yield Measurement("qk_rank", float(rank.mean()), values)
    positive = np.where(eigen.real > 0, eigen.real, 0).sum(-1) / np.abs(eigen.real).sum(-1)
    yield Measurement("qk_positive", float(positive.mean()), {"heads": _short(positive)})


def _short(values: Any) -> Any:
    """As JSON takes it, with the digits that float32 has."""
    return [float(f"{x:.6g}") for x in values] if np.ndim(values) else float(f"{values:.6g}")
