"""`deconstruct bench`: speed, alone or beside others in the same run.

deconstruct bench                     # tokens a second of the train step
deconstruct bench generate            # of greedy decoding, batch 1 and 8
deconstruct bench contexts            # milliseconds a decoded token of every variant, and bytes of its cache
deconstruct bench lengths             # train-step tokens a second of every variant at growing lengths
deconstruct bench kernels             # every program of every form, forward and backward, beside the roofline
deconstruct bench targets --peers     # on a GPU: whether kernels and train step are as fast as they are meant to be
deconstruct bench --peers             # beside transformers and torch; needs the extra `peers`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from deconstruct.bench.contexts import context_speed, contexts_as_text
from deconstruct.bench.generation import generation_speed
from deconstruct.bench.kernels import ON_ACCELERATORS, ON_CPU, kernel_speed, kernels_as_text
from deconstruct.bench.lengths import length_speed, lengths_as_text
from deconstruct.bench.roofline import draw_roofline
from deconstruct.bench.rounds import CASES, Case, speeds_as_text
from deconstruct.bench.targets import CASE, WORK, target_speed, targets_as_text
from deconstruct.bench.train_step import train_speed
from deconstruct.types import UserError

WHAT = ("train", "generate", "contexts", "lengths", "kernels", "targets")
OF_ALL = ("contexts", "lengths", "kernels", "targets")  # compare all variants or forms with each other
BATCHES = (1, 8)
LONG = Case("lengths", 1, 8192, 4_096, 256, 1024, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", default="train", choices=WHAT, help="what is measured (default train)")
    parser.add_argument("--peers", action="store_true", help="measure torch's beside it (not contexts, lengths)")
    parser.add_argument("--variant", help="of every layer (default standard; train, generate)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternating rounds (default 10)")
    parser.add_argument("--steps", type=int, metavar="N", help="train steps a round (default 3; train only)")
    parser.add_argument("--lengths", metavar="N,N,...", help="sequence lengths (lengths, kernels)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the roofline (kernels only)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    variant, steps = arguments.variant or "standard", 3 if arguments.steps is None else arguments.steps
    _check(arguments, variant, steps)
    lengths = _lengths(arguments.lengths)

    def say(found: dict[str, Any], text: str) -> None:
        print(json.dumps(found) if arguments.json else text, flush=True)

    peers, rounds, what = arguments.peers, arguments.rounds, arguments.what
    if what == "contexts":
        found = context_speed(CASES[0], rounds)
        say(found, contexts_as_text(found))
    elif what == "lengths":
        found = length_speed(LONG, rounds, **({"lengths": lengths} if lengths else {}))
        say(found, lengths_as_text(found))
    elif what == "kernels":
        work = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATORS
        found = kernel_speed(work._replace(lengths=lengths or work.lengths), rounds, peers)
        say(found, kernels_as_text(found))
        if arguments.plot:
            draw_roofline(found, Path(arguments.plot))
    elif what == "targets":
        found = target_speed(WORK, CASE, rounds, peers)
        say(found, targets_as_text(found))
    for case in () if what in OF_ALL else CASES:
        if what == "train":
            found = train_speed(case, variant, peers, rounds, steps)
            say(found, speeds_as_text(found))
        else:
            for batch in BATCHES:
                found = generation_speed(case, batch, variant, peers, rounds)
                say(found, speeds_as_text(found))
    return 0


def _check(arguments: argparse.Namespace, variant: str, steps: int) -> None:
    """Raises UserError for options that do not go together."""
    what = arguments.what
    if arguments.peers and variant != "standard":
        raise UserError(f"--variant={variant}: only standard has a peer; leave --peers out")
    if arguments.peers and what in ("contexts", "lengths"):
        raise UserError(f"--peers: {what} compares all variants with each other; leave --peers out")
    if arguments.variant and what in OF_ALL:
        raise UserError(f"--variant: {what} compares all variants with each other; leave --variant out")
    if what != "train" and arguments.steps is not None:
        raise UserError(f"--steps={steps}: only train has steps; leave --steps out")
    if arguments.lengths and what not in ("lengths", "kernels"):
        raise UserError(f"--lengths={arguments.lengths}: only lengths and kernels have them; leave --lengths out")
    if arguments.plot and what != "kernels":
        raise UserError(f"--plot={arguments.plot}: only kernels has a roofline; leave --plot out")
    if what == "targets" and jax.default_backend() == "cpu":
        raise UserError("targets are speeds on a GPU, and there is none here; bench kernels measures a CPU")
    for name, value in (("rounds", arguments.rounds), ("steps", steps)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")


def _lengths(text: str | None) -> tuple[int, ...]:
    """() where none are given."""
    try:
        lengths = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--lengths={text}: expected numbers, as in 1024,4096") from error
    if any(length < 1 for length in lengths):
        raise UserError(f"--lengths={text}: must be at least 1")
    return lengths
