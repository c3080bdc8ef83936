"""`deconstruct table DIR...`: runs side by side, perplexity by context, with what tells them apart.

A run of the paper's own size and length has the paper's number beside it: WikiText perplexity at 500m parameters and
15 B tokens (arXiv:2510.11602, table 4, context 2048). There too the order of the rows can be compared, and the numbers
cannot: the text is another.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from deconstruct.config import Config, known_keys
from deconstruct.evaluate.paper import perplexity_by_context
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import find_workdirs, named
from deconstruct.types import UserError

PAPER = {row: by_context[2048] for row, by_context in perplexity_by_context().items()}
# The model and the training that these numbers are of: configs/paper.py at size=500m, heads=mha.
PAPER_RUN = {
    "model.block": "qwen2",
    "model.hidden_size": 896,
    "model.intermediate_size": 4864,
    "model.num_layers": 24,
    "model.num_heads": 14,
    "sequence_length": 2048,
    "batch_size": 256,
    "steps": 28_610,
}
# What is measured of a run in one way only, so that rows can be compared; ledgers of old may lack the last two.
PLAIN = {"text": "validation", "skip": "", "windows": "non-overlapping", "max_tokens": 0}


class Run(NamedTuple):
    """A run that was evaluated: perplexity by context, at the latest step there is one of."""

    name: str
    config: Config
    step: int
    perplexity: dict[int, float]

    @property
    def paper(self) -> float | None:
        """The paper's number for it; None where the paper has none, or of something else."""
        model = self.config.model
        same = all(value_of(self.config, key) == value for key, value in PAPER_RUN.items())
        if not same or model.kv_heads != model.num_heads or self.step != self.config.steps:
            return None
        return PAPER.get((self.config.variant, self.config.layout))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a folder of workdirs, or workdirs")


def run(arguments: argparse.Namespace) -> int:
    runs, without = read_runs(arguments.folders)
    print(as_markdown(runs))
    if without:
        print(f"\nNot evaluated on their validation text: {', '.join(without)}.")
    return 0


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs in some folders (or that some folders are), and the names of those there is nothing to show of."""
    runs, without = [], []
    for name, run_dir in named(find_workdirs(folders)):
        records = [
            record
            for record in read_jsonl(run_dir.evaluations)
            if (record["task"], record["metric"]) == ("perplexity", "perplexity")
            and all(record.get(key, plain) == plain for key, plain in PLAIN.items())
        ]
        if not records:
            without.append(name)
            continue
        step = max(record["step"] for record in records)
        perplexity = {record["context"]: record["value"] for record in records if record["step"] == step}
        runs.append(Run(name, run_dir.read_config(), step, perplexity))
    if not runs:
        raise UserError(
            f"{', '.join(folders)}: no run in it was evaluated on its validation text; `deconstruct evaluate` does so"
        )
    return runs, without


def as_markdown(runs: list[Run]) -> str:
    """Best first, by the longest context. A column for each key of the configuration that is not the same in all."""
    contexts = sorted({context for run in runs for context in run.perplexity})
    texts: dict[str, list[str]] = {"run": [run.name for run in runs], "seed": [str(run.config.seed) for run in runs]}
    keys = differing_keys([run.config for run in runs])
    texts |= {key: [_text(value_of(run.config, key)) for run in runs] for key in keys}
    if len({run.step for run in runs}) > 1:
        texts["step"] = [str(run.step) for run in runs]
    numbers = {f"context {c}": [_number(run.perplexity.get(c), ".2f") for run in runs] for c in contexts}
    if any(run.paper for run in runs):
        numbers["paper (500m, WikiText)"] = [_number(run.paper, ".1f") for run in runs]
    order = sorted(range(len(runs)), key=lambda i: runs[i].perplexity.get(contexts[-1], float("inf")))
    columns = [*texts.values(), *numbers.values()]
    lines = [_row([*texts, *numbers]), "|---" * len(texts) + "|---:" * len(numbers) + "|"]
    return "\n".join([*lines, *(_row([column[i] for column in columns]) for i in order)])


def differing_keys(configs: Sequence[Config]) -> list[str]:
    """The keys that are not the same in all, in the order of config.py; the seed has its column anyway."""
    return [key for key in known_keys() if key != "seed" and len({value_of(c, key) for c in configs}) > 1]


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _number(value: float | None, kind: str) -> str:
    return "" if value is None else format(value, kind)


def _text(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
