"""The speeds that the kernels and the train step are meant to have on an NVIDIA GPU, each beside its peer in one run.

Kernels against cuDNN (through PyTorch) and flash-linear-attention's Triton kernels, forward and with gradients; the
train step against a compiled Qwen2ForCausalLM, the device's peak, and between variants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from deconstruct.attention.registry import VARIANTS
from deconstruct.bench.kernels import PASSES, SHARED, Work, kernel_speed
from deconstruct.bench.rounds import Case, ratio, take_turns
from deconstruct.bench.train_step import our_round, train_speed
from deconstruct.costs import accounting
from deconstruct.layout import STANDARD

WORK = Work(1 << 15, 16, 64, "bfloat16", (2048, 8192, 32768))  # at the shortest, 16 sequences share a map
CASE = Case("500m", 8, 2048, 50_304, 896, 4864, 24, 14, "bfloat16", scan=True)
# Form -> its peer, and how much faster than it the form is to be.
PEERS = {
    "softmax": ("scaled_dot_product_attention", 1.0),
    "taylor": ("fla parallel_based", 1.3),  # fla's other kernel for it stops at heads of 16
    "gated_linear": ("fla chunk_gla", 1.0),
    "gated_delta": ("fla chunk_gated_delta_rule", 1.0),
}
SHARED_MAP, BANDWIDTH, UTILISATION = 1.5, 0.7, 0.45

Times = dict[tuple[str, int, str], float]  # milliseconds by (program, length, pass)


class Target(NamedTuple):
    """`measured` is to be `least` or more; None where there is nothing to measure it with."""

    what: str
    least: float
    measured: float | None

    @property
    def reached(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.least


def target_speed(work: Work, case: Case, rounds: int, peers: bool) -> dict[str, Any]:
    """Without `peers`, what needs none."""
    kernels = kernel_speed(work, rounds, peers)
    train = train_speed(case, STANDARD, peers, rounds, steps=1)
    found = [*_kernel_targets(kernels), *_train_targets(case, train), *_variant_targets(case, rounds)]
    return {
        "device": jax.devices()[0].device_kind,
        "targets": [{**target._asdict(), "reached": target.reached} for target in found],
        "kernels": kernels,
        "train": train,
    }


def _kernel_targets(found: dict[str, Any]) -> Iterable[Target]:
    rows = [row for row in found["rows"] if row["milliseconds"] is not None]
    times = {(row["program"], row["length"], row["pass"]): row["milliseconds"] for row in rows}
    lengths = found["work"]["lengths"]
    for form, (peer, least) in PEERS.items():
        for length in lengths:
            for way in PASSES:
                theirs, ours = times.get((f"torch: {peer}", length, way)), _best(times, form, length, way)
                yield Target(f"{form} to {peer}, {length:,} positions, {way}", least, _over(theirs, ours))
    gates = [row for row in rows if row["program"].startswith("self_gate: ")]
    for length in lengths:
        for way in PASSES:
            shares = [row["share"] for row in gates if (row["length"], row["pass"]) == (length, way)]
            what = f"self_gate, share of the roofline, {length:,} positions, {way}"
            yield Target(what, BANDWIDTH, max(shares, default=None))
    shortest = lengths[0]
    sequences = Work(**found["work"]).batch(shortest)
    for way in PASSES:
        own, shared = (_best(times, form, shortest, way) for form in ("softmax", SHARED))
        what = f"one map for {sequences} sequences to a map each, {shortest:,} positions, {way}"
        yield Target(what, SHARED_MAP, _over(own, shared))


def _train_targets(case: Case, found: dict[str, Any]) -> Iterable[Target]:
    peak = accounting.peak_flops(jax.devices()[0])
    config = case.config(STANDARD)
    flops = accounting.train_flops(config.model, case.batch, case.length).needed / (case.batch * case.length)
    rate = found["tokens_per_second"]["deconstruct"]
    yield Target(f"{case.name}, share of the device's peak (MFU)", UTILISATION, rate * flops / peak if peak else None)
    yield Target(f"{case.name} to a compiled Qwen2ForCausalLM", 1.0, found.get("ratio", {}).get("median"))


def _variant_targets(case: Case, rounds: int) -> Iterable[Target]:
    """Two at a time, as two models fit where seven do not."""
    standard = our_round(case, STANDARD, 1)
    for name in VARIANTS:
        if name != STANDARD:
            seconds = take_turns({STANDARD: standard, name: our_round(case, name, 1)}, rounds, f"{case.name} {name}")
            yield Target(f"{case.name} {name} to standard", 1.0, ratio(*seconds.values())["median"])


def _best(times: Times, form: str, length: int, way: str) -> float | None:
    """Of the form's programs."""
    own = [taken for (name, *rest), taken in times.items() if name.startswith(f"{form}: ") and rest == [length, way]]
    return min(own, default=None)


def _over(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else round(theirs / ours, 3)


def targets_as_text(found: dict[str, Any]) -> str:
    words = {True: "reached", False: "missed", None: "not measured"}
    lines = [f"{found['device']}: measured (aim)"]
    for row in found["targets"]:
        measured = "" if row["measured"] is None else f"{row['measured']:.2f} "
        lines.append(f"{words[row['reached']]:<13} {row['what']}: {measured}({row['least']:g})")
    return "\n".join(lines)
