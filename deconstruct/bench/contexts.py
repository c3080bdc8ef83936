"""Milliseconds of one decoded token at growing contexts, for every variant, and the bytes of its cache.

Caches and constants start as zeros, and positions stand at the end of the cache: what a step costs does not depend on
what it reads.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deconstruct.attention.variants import one_of_each
from deconstruct.bench.rounds import Case, Round, ratio, take_turns
from deconstruct.config import ModelConfig
from deconstruct.costs import accounting
from deconstruct.costs.paper import PAPER_COSTS
from deconstruct.layout import STANDARD
from deconstruct.model import decode
from deconstruct.model.language_model import LanguageModel, build_model

CONTEXTS = (256, 1024, 4096, 16384)
STEPS = 8


def context_speed(
    case: Case, rounds: int, contexts: tuple[int, ...] = CONTEXTS, variants: Sequence[str] = ()
) -> dict[str, Any]:
    """One sequence, one model per variant, uniform; in each round all variants decode STEPS tokens at one context.
    `variants`: standard and others (default: every one there is)."""
    names = variants or one_of_each()
    configs = {name: dataclasses.replace(case.config(name).model, fixed_length=max(contexts)) for name in names}
    rows: dict[str, dict[str, Any]] = {
        name: {"milliseconds": [], "ratio": [], "cache_bytes": [], "paper_cache_bytes": []} for name in configs
    }
    models = {name: build_model(config) for name, config in configs.items()}
    for context in contexts:
        contenders = {name: _round(models[name], context) for name in configs}
        seconds = take_turns(contenders, rounds, f"context {context:,}")
        for name, row in rows.items():
            row["milliseconds"].append(round(1e3 * statistics.median(seconds[name]) / STEPS, 2))
            row["ratio"].append(ratio(seconds[name], seconds[STANDARD]))
            row["cache_bytes"].append(_cache_bytes(configs[name], context))
            row["paper_cache_bytes"].append(_paper_cache_bytes(name, configs[name], context))
    return {"case": case._asdict(), "contexts": list(contexts), "variants": rows}


def _round(model: LanguageModel, context: int) -> Round:
    decoder = decode.Decoder(model, 1, context)

    def at_the_end(x: Any) -> jax.Array:
        """Zeros for arrays; scalars, which are positions, back to the start."""
        return jnp.zeros(x.shape, x.dtype) if x.shape else jnp.asarray(context - STEPS, x.dtype)

    cache, decoder.constants = jax.tree.map(at_the_end, decoder.abstract())
    held = {"cache": cache}
    tokens = jnp.zeros((1, 1), jnp.int32)

    def round_() -> float:
        cache = jax.tree.map(lambda x: x if x.shape else at_the_end(x), held["cache"])
        start = time.perf_counter()
        for _ in range(STEPS):
            logits, cache, _ = decoder.extend(tokens, cache)
        jax.block_until_ready((logits, cache))
        taken = time.perf_counter() - start
        held["cache"] = cache
        return taken

    return round_


def _cache_bytes(config: ModelConfig, context: int) -> int:
    return accounting.cache_bytes(dataclasses.replace(config, dtype="bfloat16"), 1, context)


def _paper_cache_bytes(name: str, config: ModelConfig, context: int) -> float | None:
    if name not in PAPER_COSTS:  # the shapes measured have no grouped queries, as the paper's formulas
        return None
    return config.num_layers * PAPER_COSTS[name].cache(1, context, config.hidden_size, config.num_heads)


def contexts_as_text(found: dict[str, Any]) -> str:
    case = Case(**found["case"])
    contexts = "".join(f"{context:>18,}" for context in found["contexts"])
    lines = [f"{case.name}, d {case.hidden}, {case.layers} layers, one sequence, float32"]
    lines += ["", f"{'ms a token (to standard)':<26}{contexts}"]
    for name, row in found["variants"].items():
        times = zip(row["milliseconds"], row["ratio"], strict=True)
        lines.append(f"{name:<26}" + "".join(f"{_time(taken, against):>18}" for taken, against in times))
    lines += ["", f"{'kB of cache, bf16 (paper)':<26}{contexts}"]
    for name, row in found["variants"].items():
        sizes = zip(row["cache_bytes"], row["paper_cache_bytes"], strict=True)
        lines.append(f"{name:<26}" + "".join(f"{_size(ours, paper):>18}" for ours, paper in sizes))
    return "\n".join(lines)


def _time(taken: float, against: dict[str, float]) -> str:
    return f"{taken:.2f} ({against['median']:.2f})"


def _size(ours: int, paper: float | None) -> str:
    return f"{ours / 1e3:,.0f} ({'-' if paper is None else f'{paper / 1e3:,.0f}'})"
