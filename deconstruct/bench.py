"""`deconstruct bench`: tokens a second of the train step, alone or beside Hugging Face transformers in the same run.

    deconstruct bench                 # this code alone
    deconstruct bench --peers         # beside Qwen2ForCausalLM + torch.optim.AdamW(fused=True); needs the extra `peers`

Both train the same shapes in float32 on the CPU, without clipping, on random tokens. Rounds of the two alternate, so
that whatever else the machine does falls on both; a figure is the median over rounds, and the ratio the median of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from deconstruct.config import Config, default_config, resolve
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import make_state_spec
from deconstruct.train.step import batch_of, make_step
from deconstruct.types import UserError


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


CASES = (
    Case("70m", 2, 512, 50_304, 512, 2048, 6, 8),
    Case("small", 4, 256, 4_096, 256, 1024, 4, 4),
)
Round = Callable[[], float]  # seconds of one round of steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", action="store_true", help="measure transformers + torch beside it")
    parser.add_argument("--variant", default="standard", help="of every layer (only standard has a peer)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternating rounds (default 10)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps a round (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a case")


def run(arguments: argparse.Namespace) -> int:
    if arguments.peers and arguments.variant != "standard":
        raise UserError(f"--variant={arguments.variant}: only standard has a peer; leave --peers out")
    for case in CASES:
        result = measure(case, arguments.variant, arguments.peers, arguments.rounds, arguments.steps)
        print(json.dumps(result) if arguments.json else _as_text(result), flush=True)
    return 0


def measure(case: Case, variant: str, peers: bool, rounds: int, steps: int) -> dict[str, Any]:
    """tokens/s of this code, and of the peer if asked for, over alternating rounds."""
    contenders = {"deconstruct": _our_round(case, variant, steps)}
    if peers:
        contenders["transformers"] = _peer_round(case, steps)
    for contender in contenders.values():
        contender()  # compiles, and warms up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    tokens = case.batch * case.length * steps
    result: dict[str, Any] = {"case": case._asdict(), "variant": variant, "device": jax.devices()[0].device_kind}
    result["tokens_per_second"] = {name: round(tokens / statistics.median(s)) for name, s in seconds.items()}
    if peers:
        ratios = [theirs / ours for ours, theirs in zip(seconds["deconstruct"], seconds["transformers"], strict=True)]
        result["ratio"] = {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
    return result


def case_config(case: Case, variant: str) -> Config:
    config = default_config()
    config.update({"variant": variant, "data": "", "batch_size": case.batch, "sequence_length": case.length})
    config.model.update(
        {
            "hidden_size": case.hidden,
            "intermediate_size": case.intermediate,
            "num_layers": case.layers,
            "num_heads": case.heads,
            "vocab_size": case.vocabulary,
            "dtype": "float32",
            "remat": False,
            "scan": False,
        }
    )
    config.optimizer.clip_norm = 0.0
    return resolve(config)


def _tokens(case: Case) -> np.ndarray:
    return np.random.default_rng(0).integers(0, case.vocabulary, (case.batch, case.length + 1), np.int32)


def _our_round(case: Case, variant: str, steps: int) -> Round:
    config = case_config(case, variant)
    optimizer = make_optimizer(config)
    spec = make_state_spec(config, optimizer, single_device_mesh())
    step = make_step(spec.graphdef, optimizer, make_schedule(config))
    compiled = jax.jit(lambda state, rows: step(state, batch_of(rows)), donate_argnums=0)
    held = {"state": spec.init(None)}
    rows = jax.device_put(_tokens(case))

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            held["state"], metrics = compiled(held["state"], rows)
        jax.block_until_ready((held["state"], metrics))
        return time.perf_counter() - start

    return round_


def _peer_round(case: Case, steps: int) -> Round:
    try:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise UserError("--peers needs torch and transformers: pip install 'deconstruct[peers]'") from error
    shape = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(shape).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.9999), weight_decay=0.1, fused=True)
    # transformers shifts the labels itself: length + 1 tokens in would be one position more than ours.
    tokens = torch.from_numpy(_tokens(case)[:, :-1].astype(np.int64))

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    return round_


def _as_text(result: dict[str, Any]) -> str:
    case = Case(**result["case"])
    speeds = ", ".join(f"{name} {rate:,} tokens/s" for name, rate in result["tokens_per_second"].items())
    ratio = result.get("ratio")
    against = f", ratio {ratio['median']} ({ratio['least']} to {ratio['most']})" if ratio else ""
    shape = f"batch {case.batch} x {case.length}, d {case.hidden}, {case.layers} layers, vocabulary {case.vocabulary:,}"
    return f"{case.name} ({shape}), {result['variant']}: {speeds}{against}"
