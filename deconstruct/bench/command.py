"""`deconstruct bench`: speed, alone or beside Hugging Face transformers in the same run.

deconstruct bench                     # tokens a second of the train step
deconstruct bench generate            # of greedy decoding, batch 1 and 8
deconstruct bench contexts            # milliseconds a decoded token of every variant, and bytes of its cache
deconstruct bench --peers             # beside transformers and torch; needs the extra `peers`
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from deconstruct.bench.contexts import context_speed, contexts_as_text
from deconstruct.bench.generation import generation_speed
from deconstruct.bench.rounds import CASES, speeds_as_text
from deconstruct.bench.train_step import train_speed
from deconstruct.types import UserError

WHAT = ("train", "generate", "contexts")
BATCHES = (1, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", default="train", choices=WHAT, help="what is measured (default train)")
    parser.add_argument("--peers", action="store_true", help="measure transformers + torch beside it (not contexts)")
    parser.add_argument("--variant", help="of every layer (default standard, the only one with a peer; not contexts)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternating rounds (default 10)")
    parser.add_argument("--steps", type=int, metavar="N", help="train steps a round (default 3; train only)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    variant, steps = arguments.variant or "standard", 3 if arguments.steps is None else arguments.steps
    if arguments.peers and variant != "standard":
        raise UserError(f"--variant={variant}: only standard has a peer; leave --peers out")
    if arguments.what == "contexts":
        for name in ("peers", "variant"):
            if getattr(arguments, name):
                raise UserError(f"--{name}: contexts compares all variants with each other; leave --{name} out")
    if arguments.what != "train" and arguments.steps is not None:
        raise UserError(f"--steps={steps}: only train has steps; leave --steps out")
    for name, value in (("rounds", arguments.rounds), ("steps", steps)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")

    def say(found: dict[str, Any], text: str) -> None:
        print(json.dumps(found) if arguments.json else text, flush=True)

    peers, rounds = arguments.peers, arguments.rounds
    if arguments.what == "contexts":
        found = context_speed(CASES[0], rounds)
        say(found, contexts_as_text(found))
    for case in CASES:
        if arguments.what == "train":
            found = train_speed(case, variant, peers, rounds, steps)
            say(found, speeds_as_text(found))
        elif arguments.what == "generate":
            for batch in BATCHES:
                found = generation_speed(case, batch, variant, peers, rounds)
                say(found, speeds_as_text(found))
    return 0
