"""Costs side by side: the paper's formula, ours, and what the compiled programs do (`deconstruct describe --costs`).

One layer's mixer for every variant, then the model of the configuration. Compiling is the work: nothing is run, and
nothing is allocated but one layer's cache at a time. FLOPs are counted in float32 programs, because XLA counts a cast
as an operation; bytes are those of the configuration's own dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from deconstruct.attention.variants import find_variant, one_of_each
from deconstruct.config import ModelConfig
from deconstruct.costs import accounting, programs
from deconstruct.costs.paper import PAPER_COSTS, WITHOUT_ROW, without_formulas
from deconstruct.model.decode import cache_bytes

TOLERANCE = 0.05  # a compiled program further than this from its formula is explained


def costs(config: ModelConfig, batch: int, length: int) -> dict[str, Any]:
    """`layer`: for each variant, the costs of one mixer; `model`: those of the whole model, as its layout has it.
    With XLA's kernels, whatever `impl` the configuration names (but reference).

    FLOPs and bytes. `dense` and `needed` are formulas (see `Flops`), `dense_compiled` and `compiled` are XLA's analysis
    of the reference and of the fast path; `paper` is None where the paper has no formula. `without_paper` says why it
    has none for this shape, "" where it has.
    """
    config, names = programs.traceable(config), one_of_each()
    rows = []
    with tqdm(total=len(names) + 1, desc="compiling", leave=False, disable=None) as bar:
        for name in names:
            bar.set_postfix_str(name)
            rows.append(layer_costs(config, name, batch, length))
            bar.update()
        bar.set_postfix_str("the model")
        model = model_costs(config, batch, length)
    sizes = {"batch": batch, "sequence_length": length}
    return {**sizes, "without_paper": without_formulas(config), "layer": rows, "model": model}


def layer_costs(config: ModelConfig, name: str, batch: int, length: int) -> dict[str, Any]:
    mixer = programs.abstract_block(config, name).mixer
    assert mixer is not None
    variant = find_variant(name)
    forward, decoded = mixer.flops(batch, length), mixer.decode_flops(batch, length)
    counted = dataclasses.replace(config, dtype="float32")
    fast = programs.mixer_program(counted, name, batch, length)
    plain = programs.mixer_program(dataclasses.replace(counted, impl="reference"), name, batch, length)
    prefill = {"dense": forward.dense, "needed": forward.needed, "compiled": programs.compiled_flops(fast)}
    train = {"dense": 3 * forward.dense, "needed": 3 * forward.needed}
    train["compiled"] = programs.compiled_flops(programs.with_gradients(fast))
    if variant.form is not None:
        prefill["dense_compiled"] = programs.compiled_flops(plain)
        train["dense_compiled"] = programs.compiled_flops(programs.with_gradients(plain))
    else:  # a mixer has one way to be computed
        prefill["dense_compiled"], train["dense_compiled"] = prefill["compiled"], train["compiled"]
    init = functools.partial(mixer.init_cache, batch, length, config.hidden_size, jnp.dtype(config.dtype))
    paper = None if without_formulas(config) else PAPER_COSTS.get(name)
    sizes = (batch, length, config.hidden_size, config.num_heads)
    return {
        "variant": name,
        "prefill": {"paper": paper and paper.prefill(*sizes), **prefill},
        "train": train,
        "decode": {
            "paper": paper and paper.decode(*sizes),
            "needed": decoded.needed,
            "compiled": programs.compiled_flops(programs.mixer_decode_program(counted, name, batch, length)),
        },
        "cache": {
            "paper": paper and paper.cache(*sizes),
            "formula": cache_bytes(jax.eval_shape(init)),
            "measured": sum(x.nbytes for x in jax.tree.leaves(init()) if np.ndim(x)),
            "constants": programs.constant_bytes(config, name, batch, length),
        },
        "activations": {
            "paper": paper and paper.activations(*sizes),
            "kept": programs.kept_bytes(programs.mixer_program(config, name, batch, length)),
        },
        "differs": paper.differs if paper else WITHOUT_ROW.get(name, ""),
        "overhead": variant.form.overhead if variant.form else "",
    }


def model_costs(config: ModelConfig, batch: int, length: int) -> dict[str, Any]:
    counted = dataclasses.replace(config, dtype="float32")
    return {
        "prefill": {
            "needed": accounting.prefill_flops(config, batch, length).needed,
            "compiled": programs.compiled_flops(programs.model_prefill_program(counted, batch, length)),
        },
        "decode": {
            "needed": accounting.decode_flops(config, batch, length).needed,
            "compiled": programs.compiled_flops(programs.model_decode_program(counted, batch, length)),
        },
        "train": {
            "needed": accounting.train_flops(config, batch, length).needed,
            "compiled": programs.compiled_flops(programs.model_train_program(counted, batch, length)),
        },
        "cache": accounting.cache_bytes(config, batch, length),
        "activations": accounting.activation_bytes(config, batch, length),
    }


def as_text(found: dict[str, Any]) -> str:
    rows, model = found["layer"], found["model"]
    lines = [f"One mixer, {found['batch']} x {found['sequence_length']} tokens. FLOPs in millions, bytes in thousands."]
    for key, title in (("prefill", "FLOPs, forward"), ("train", "FLOPs, forward and backward")):
        lines += ["", f"{title:<30}{'paper':>12}{'dense':>12}{'compiled':>12}{'':>8}{'needed':>12}{'compiled':>12}"]
        for row in rows:
            cost = row[key]
            lines.append(
                f"{row['variant']:<30}{_number(cost.get('paper'))}"
                f"{_number(cost['dense'])}{_against(cost['dense_compiled'], cost['dense'])}"
                f"{_number(cost['needed'])}{_against(cost['compiled'], cost['needed'])}"
            )
    lines += ["", f"{'FLOPs, one more token':<30}{'paper':>12}{'needed':>12}{'compiled':>12}"]
    for row in rows:
        cost = row["decode"]
        compiled = _against(cost["compiled"], cost["needed"], 1e6)
        lines.append(f"{row['variant']:<30}{_number(cost['paper'])}{_number(cost['needed'])}{compiled}")
    titles = ("cache: paper", "formula", "measured", "kept: paper", "measured")
    lines += ["", f"{'bytes':<30}" + "".join(f"{title:>14}" for title in titles)]
    for row in rows:
        cache, kept = row["cache"], row["activations"]
        numbers = (cache["paper"], cache["formula"], cache["measured"], kept["paper"], kept["kept"])
        lines.append(f"{row['variant']:<30}" + "".join(f"  {_number(n, 1e3)}" for n in numbers))
    lines += ["", f"{'the model, as its layout has it':<42}{'needed':>12}{'compiled':>12}"]
    for key, title in (
        ("prefill", "FLOPs, prefill"),
        ("decode", "FLOPs, one more token"),
        ("train", "FLOPs, training"),
    ):
        lines.append(
            f"{title:<42}{_number(model[key]['needed'])}{_against(model[key]['compiled'], model[key]['needed'])}"
        )
    lines.append(f"{'bytes of cache':<42}{_number(model['cache'], 1e3)}")
    lines.append(f"{'bytes of activations kept':<42}{_number(model['activations'], 1e3)}")
    return "\n".join([*lines, "", *_notes(rows, found["without_paper"])])


def _notes(rows: list[dict[str, Any]], without_paper: str) -> list[str]:
    """Why a compiled program does more than is needed, and where the paper's formulas and ours differ."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        far = any(abs(_excess(row[key]["compiled"], row[key]["needed"])) > TOLERANCE for key in ("prefill", "train"))
        if far and row["overhead"]:
            reasons.setdefault(f"needed and compiled differ by {row['overhead']}", []).append(row["variant"])
        if row["differs"]:
            reasons.setdefault(f"in the paper {row['differs']}", []).append(row["variant"])
        if constants := row["cache"]["constants"]:
            what = f"decoding keeps {constants:,} bytes of the fixed stream beside its cache, for any batch"
            reasons.setdefault(what, []).append(row["variant"])
    kept = "Kept for the backward pass: the paper counts q, k, v, the result and the map; measured is all JAX keeps."
    return [
        without_paper or kept,
        *(f"{', '.join(names)}: {reason}." for reason, names in reasons.items()),
    ]


def _excess(compiled: float, formula: float) -> float:
    return compiled / formula - 1


def _number(value: float | None, unit: float = 1e6) -> str:
    return f"{'-' if value is None else format(value / unit, ',.1f'):>12}"


def _against(compiled: float, formula: float, unit: float = 1e6) -> str:
    return f"{_number(compiled, unit)}{_excess(compiled, formula):>+8.1%}"
