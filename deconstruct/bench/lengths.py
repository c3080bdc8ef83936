"""Tokens a second of the train step at growing lengths, for every variant, beside standard in the same rounds."""

from __future__ import annotations

import statistics
from typing import Any

from deconstruct.attention.variants import one_of_each
from deconstruct.bench.rounds import Case, ratio, take_turns
from deconstruct.bench.train_step import our_round
from deconstruct.layout import STANDARD

LENGTHS = (512, 2048, 8192)


def length_speed(case: Case, rounds: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Uniform models, one update a round. `case.batch` x `case.length` tokens a batch, whatever the length, but one
    sequence at least. `ratio`: how much faster than standard."""
    variants: dict[str, dict[str, Any]] = {
        name: {"tokens_per_second": [], "ratio": []} for name in (STANDARD, *one_of_each())
    }
    for length in lengths:
        batch = max(1, case.batch * case.length // length)
        contenders = {name: our_round(case._replace(batch=batch, length=length), name, 1) for name in variants}
        seconds = take_turns(contenders, rounds, f"length {length:,}")
        for name, row in variants.items():
            row["tokens_per_second"].append(round(batch * length / statistics.median(seconds[name])))
            row["ratio"].append(ratio(seconds[STANDARD], seconds[name]))
    return {"case": case._asdict(), "lengths": list(lengths), "variants": variants}


def lengths_as_text(found: dict[str, Any]) -> str:
    case = Case(**found["case"])
    lines = [f"{case.name}, d {case.hidden}, {case.layers} layers, {case.batch * case.length:,} tokens a step", ""]
    lines.append(f"{'tokens/s (to standard)':<26}" + "".join(f"{length:>18,}" for length in found["lengths"]))
    for name, row in found["variants"].items():
        against = (to["median"] for to in row["ratio"])
        cells = (f"{rate:,} ({to:.2f})" for rate, to in zip(row["tokens_per_second"], against, strict=True))
        lines.append(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
