"""What a run has learned, in a few lines."""

from __future__ import annotations

import math
from typing import Any

from deconstruct.config import Config
from deconstruct.data.manifest import load_manifest
from deconstruct.layout import replaced_layers
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


def report(workdir: str) -> str:
    """Loss before and after, and perplexity by text: of the validation text beside what guessing by frequency would
    reach."""
    run_dir = Workdir(workdir)
    config = run_dir.read_config()
    logged = read_jsonl(run_dir.metrics)
    evaluated = [
        record
        for record in read_jsonl(run_dir.evaluations)
        if (record["task"], record["metric"]) == ("perplexity", "perplexity") and not record["skip"]
    ]
    if not logged or not evaluated:
        raise UserError(f"{workdir}: nothing to report yet; run `deconstruct train` and `deconstruct evaluate` first")
    manifest = load_manifest(config.data)
    replaced = len(replaced_layers(config.model.layers))
    lines = [
        f"{workdir}: {len(config.model.layers)} layers, {config.variant} in {replaced} of them ({config.layout})",
        *_losses(logged, config),
        f"  unigram perplexity    {manifest.unigram_perplexity:.1f} (guessing by frequency, same validation text)",
    ]
    latest = max(r["step"] for r in evaluated)
    of_latest = [record for record in evaluated if record["step"] == latest]
    for record in sorted(of_latest, key=lambda r: (r["text"] != "validation", r["text"], r["context"])):
        text = record["text"].partition(":")[0]  # a file's has its hash behind the name
        what = "validation perplexity" if text == "validation" else f"perplexity of {text}"
        lines.append(
            f"  {what:<21} {record['value']:.1f} at context {record['context']} "
            f"({record['text']}, {record['tokens']:,} tokens, step {latest})"
        )
    return "\n".join(lines)


def _losses(logged: list[dict[str, Any]], config: Config) -> list[str]:
    """The first and the last of the run, and of each stage of distillation in it."""
    lines = []
    for stage in dict.fromkeys(record.get("stage", "") for record in logged):
        own = [record for record in logged if record.get("stage", "") == stage]
        first, last = own[0], own[-1]
        name = f"loss of {stage} stage" if stage else "training loss"
        chance = "" if stage else f" (chance: {math.log(config.model.vocab_size):.3f})"
        ends = ", ".join(f"{record['loss']:.3f} at step {record['step']}" for record in (first, last))
        lines.append(f"  {name:<21} {ends}{chance}")
    return lines
