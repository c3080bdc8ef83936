"""What a layer costs by the paper's own formulas (arXiv:2510.11602, tables 5 to 8), and where ours differ.

B sequences of L positions, width d, h heads of width d / h with keys and values of their own (no grouped queries), on
one device. FLOPs count a multiply-add as two, bytes are of half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from deconstruct.config import ModelConfig

Formula = Callable[[float, float, float, float], float]  # of B, L, d, h


class PaperCosts(NamedTuple):
    prefill: Formula
    decode: Formula
    cache: Formula
    activations: Formula
    differs: str


_PROJECTIONS = "the output projection is left out (6 of 8 B L d^2)"

_STANDARD = PaperCosts(
    prefill=lambda B, L, d, h: 4 * B * L**2 * d + 6 * B * L * d**2,
    decode=lambda B, L, d, h: 6 * B * d**2 + 4 * B * L * d,
    cache=lambda B, L, d, h: 4 * B * L * d,
    activations=lambda B, L, d, h: 8 * B * L * d + 2 * B * L**2 * h,
    differs=_PROJECTIONS,
)

# The rows of fixed_seq_qk and rnd_emb_qk.
_FIXED = PaperCosts(
    prefill=lambda B, L, d, h: 2 * L**2 * d + 2 * B * L**2 * d + 6 * B * L * d**2,
    decode=lambda B, L, d, h: 2 * L * d + 2 * B * L * d + 6 * B * d**2,
    cache=lambda B, L, d, h: 2 * (B + 1) * L * d,
    activations=lambda B, L, d, h: 4 * B * L * d + 8 * L * d + 2 * L**2 * h,
    differs=f"{_PROJECTIONS}, and Q and K are projected for every sequence: here once for all (4 L d^2), "
    "and not at all in decoding, where they are constants (with maps computed beforehand the paper "
    "has 2 L^2 d + 2 B L d^2, and 2 B L d + 2 d^2 in decoding)",
)

PAPER_COSTS: dict[str, PaperCosts] = {
    "standard": _STANDARD,
    "static_emb_qk": _STANDARD,
    "rnd_emb_qk": _FIXED,
    "fixed_seq_qk": _FIXED,
    "mlp": PaperCosts(
        prefill=lambda B, L, d, h: 6 * B * L * d**2,
        decode=lambda B, L, d, h: 6 * B * d**2,
        cache=lambda B, L, d, h: 0,
        activations=lambda B, L, d, h: 8 * B * L * d,
        differs="three matmuls between widths d and 4 d / 3 are counted as 6 B L d^2; they take 8",
    ),
    "non_approximate": PaperCosts(
        prefill=lambda B, L, d, h: 6 * B * L * d**2,
        decode=lambda B, L, d, h: 6 * B * d**2,
        cache=lambda B, L, d, h: 2 * B * d + 4 * B * h,
        activations=lambda B, L, d, h: 8 * B * L * d + 4 * B * L * h,
        differs=f"{_PROJECTIONS}, and so is the running mean, of order B L d; our state is float32, twice the bytes",
    ),
    # Printed for `approximate`; they are those of its recurrence (equations 14 to 17).
    "taylor_diagonal": PaperCosts(
        prefill=lambda B, L, d, h: 14 * B * L * d**2,
        decode=lambda B, L, d, h: 10 * B * d**2,
        cache=lambda B, L, d, h: 6 * B * d + 4 * B * d**2 / h,
        activations=lambda B, L, d, h: 11 * B * L * d + 3 * B * d**2 / h,
        differs=f"{_PROJECTIONS}; the recurrence is counted as 8 B L d^2 (4 B d^2 in decoding), as if there were one "
        "head: h heads take 8 B L d^2 / h (8 B d^2 / h); our state is float32, twice the bytes; the formula of "
        "activations is hard to read, and given as we read it",
    ),
}

WITHOUT_ROW = {
    "approximate": "the row of this name is that of equations 14 to 17, which keep squares only: see taylor_diagonal"
}


def without_formulas(config: ModelConfig) -> str:
    """Why the formulas do not speak of this shape, in sentences; "" where they do."""
    reasons = []
    if config.kv_heads != config.num_heads:
        reasons.append("as many key heads as query heads; this configuration has fewer")
    if (width := config.num_heads * config.head_size) != config.hidden_size:
        reasons.append(
            f"heads that share out the width d; this configuration has {config.num_heads} heads of "
            f"{config.head_size}, together {width:,}, and d = {config.hidden_size:,}"
        )
    return " ".join(f"The paper's formulas are for {reason}." for reason in reasons)
