"""Shapes that are measured, and rounds of contenders that take turns.

Whatever else the machine does then falls on all of them: a figure is the median over rounds, a ratio the median of the
rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from deconstruct.config import Config, default_config
from deconstruct.experiment import resolve
from deconstruct.types import UserError

Round = Callable[[], float]  # seconds of one round


class Case(NamedTuple):
    """A model and a batch."""

    name: str
    batch: int
    length: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    dtype: str = "float32"
    scan: bool = False

    def __str__(self) -> str:
        return (
            f"{self.name} (batch {self.batch} x {self.length}, d {self.hidden}, {self.layers} layers, "
            f"vocabulary {self.vocabulary:,})"
        )

    def config(self, variant: str) -> Config:
        """A model of one variant, nothing recomputed; no clipping."""
        config = default_config()
        config.update({"variant": variant, "data": "", "batch_size": self.batch, "sequence_length": self.length})
        config.model.update(
            {
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_layers": self.layers,
                "num_heads": self.heads,
                "vocab_size": self.vocabulary,
                "dtype": self.dtype,
                "remat": False,
                "scan": self.scan,
            }
        )
        config.optimizer.clip_norm = 0.0
        return resolve(config)

    def tokens(self, length: int) -> np.ndarray:
        """int32 [batch, length], random, always the same."""
        return np.random.default_rng(0).integers(0, self.vocabulary, (self.batch, length), np.int32)


CASES = (
    Case("70m", 2, 512, 50_304, 512, 2048, 6, 8),
    Case("small", 4, 256, 4_096, 256, 1024, 4, 4),
)


def take_turns(contenders: Mapping[str, Round], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each contender's rounds, after one that is not counted (it compiles)."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm(total=(rounds + 1) * len(contenders), desc=what, leave=False, disable=None) as bar:
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                bar.set_postfix_str(name)
                taken = contender()
                if number:
                    seconds[name].append(taken)
                bar.update()
    return seconds


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Of the seconds of two contenders, round by round: the median, the least and the most."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }


def speeds(case: Case, seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens a second of each contender, and how much faster the first is than the second, if there is one."""
    found: dict[str, Any] = {"case": case._asdict()}
    found["tokens_per_second"] = {name: round(tokens / statistics.median(s)) for name, s in seconds.items()}
    if len(seconds) > 1:
        ours, theirs = seconds.values()
        found["ratio"] = ratio(theirs, ours)
    return found


def speeds_as_text(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate:,} tokens/s" for name, rate in found["tokens_per_second"].items())
    times = found.get("ratio")
    return f"{Case(**found['case'])}: {rates}" + (
        f", ratio {times['median']} ({times['least']} to {times['most']})" if times else ""
    )


def import_peers() -> tuple[Any, Any]:
    """torch and transformers. Raises UserError where they are not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError("--peers needs torch and transformers: pip install 'deconstruct[peers]'") from error
    return torch, transformers
