"""`deconstruct describe`: what a configuration is, from shapes alone."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from deconstruct.attention import form
from deconstruct.attention.parameters import mixer_parameters
from deconstruct.config import Config
from deconstruct.costs import accounting, side_by_side
from deconstruct.experiment import load_config
from deconstruct.layout import STANDARD
from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="also every variant's costs: formulas beside compiled programs",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="B", help="sequences that FLOPs and bytes are for (default 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch}: must be at least 1")
    config = load_config(arguments.config, arguments=arguments.overrides)
    # Nothing is computed here: which program would do it is no news.
    logging.getLogger(form.__name__).setLevel(logging.WARNING)
    description = describe(config, arguments.batch)
    if arguments.costs:
        description["costs"] = side_by_side.costs(config.model, arguments.batch, config.sequence_length)
    print(json.dumps(description) if arguments.json else as_text(description))
    if arguments.costs and not arguments.json:
        print("\n" + side_by_side.as_text(description["costs"]))
    return 0


def describe(config: Config, batch: int = 1) -> dict[str, Any]:
    """Layers, plan, parameters, FLOPs of `batch` sequences, bytes of their cache and activations; nothing is
    allocated."""
    model, length = config.model, config.sequence_length
    parameters = accounting.parameters(model)
    difference = accounting.difference_from_standard(model)
    forward = accounting.forward_flops(model, batch, length)
    train = accounting.train_flops(model, batch, length)
    return {
        "layers": list(model.layers),
        "plan": [{"unit": list(segment.unit), "repeats": segment.repeats} for segment in model.plan],
        "parameters": parameters,
        "difference_from_standard": difference,
        "per_layer": {
            "forward_flops": [flops.needed for flops in accounting.layer_forward_flops(model, batch, length)],
            "decode_flops": [flops.needed for flops in accounting.layer_decode_flops(model, batch, length)],
            "cache_bytes": accounting.layer_cache_bytes(model, batch, length),
            "activation_bytes": accounting.layer_activation_bytes(model, batch, length),
        },
        "mixer_difference_per_layer": [
            count - mixer_parameters(model, STANDARD) for count in parameters["mixer_per_layer"]
        ],
        "difference_per_layer": accounting.differences_from_standard(model),
        "flops": {
            "batch": batch,
            "sequence_length": length,
            "forward": forward.needed,
            "forward_dense": forward.dense,
            "train": train.needed,
            "train_dense": train.dense,
            "prefill": accounting.prefill_flops(model, batch, length).needed,
            "decode": accounting.decode_flops(model, batch, length).needed,
        },
        "cache_bytes": accounting.cache_bytes(model, batch, length),
        "activation_bytes": accounting.activation_bytes(model, batch, length),
        "vocabulary": {"size": model.vocab_size, "padded": model.padded_vocab},
        "tokens_per_step": config.batch_size * length,
    }


def as_text(description: dict[str, Any]) -> str:
    parameters, flops = description["parameters"], description["flops"]
    plan = " + ".join(f"{segment['repeats']} x ({', '.join(segment['unit'])})" for segment in description["plan"])
    lines = [
        f"plan        {plan}",
        f"parameters  {parameters['total']:,} (embedding {parameters['embedding']:,}; "
        f"{description['difference_from_standard']:+,} against standard)",
        f"vocabulary  {description['vocabulary']['size']:,}, padded to {description['vocabulary']['padded']:,}",
        f"FLOPs       forward {flops['forward']:.4g}, training {flops['train']:.4g} "
        f"({flops['batch']} x {flops['sequence_length']} tokens; causal half, no recomputation)",
        f"            prefill {flops['prefill']:.4g}, one more token {flops['decode']:.4g}",
        f"cache       {description['cache_bytes']:,} bytes at {flops['sequence_length']} positions",
        f"activations {description['activation_bytes']:,} bytes kept for the backward pass",
        f"a step      {description['tokens_per_step']:,} tokens",
        "",
        f"{'layer  variant':<28}{'mixer parameters':>17}{'to standard':>12}{'with MLP':>10}"
        f"{'forward FLOPs':>14}{'one token':>11}{'cache bytes':>13}{'kept bytes':>13}",
    ]
    layer = description["per_layer"]
    rows = zip(
        description["layers"],
        parameters["mixer_per_layer"],
        description["mixer_difference_per_layer"],
        description["difference_per_layer"],
        layer["forward_flops"],
        layer["decode_flops"],
        layer["cache_bytes"],
        layer["activation_bytes"],
        strict=True,
    )
    lines += [
        f"{i:>5}  {name:<21}{count:>17,}{difference:>+12,}{matched:>+10,}"
        f"{forward:>14.4g}{token:>11.4g}{cache:>13,}{kept:>13,}"
        for i, (name, count, difference, matched, forward, token, cache, kept) in enumerate(rows, 1)
    ]
    return "\n".join(lines)
