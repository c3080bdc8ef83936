"""Tokens a second of the train step, alone or beside Qwen2ForCausalLM + torch.optim.AdamW(fused=True).

Both train the same shapes without clipping, on random tokens: on the CPU in float32; on a GPU in bfloat16 with float32
parameters, PyTorch's model compiled.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from deconstruct.bench.rounds import Case, Round, import_peers, speeds, take_turns
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import make_state_spec
from deconstruct.train.step import batch_of, make_step


def train_speed(case: Case, variant: str, peers: bool, rounds: int, steps: int) -> dict[str, Any]:
    """Rounds of `steps` updates each."""
    contenders = {"deconstruct": our_round(case, variant, steps)}
    if peers:
        contenders["transformers"] = _peer_round(case, steps)
    seconds = take_turns(contenders, rounds, case.name)
    return {"variant": variant, **speeds(case, seconds, case.batch * case.length * steps)}


def our_round(case: Case, variant: str, steps: int) -> Round:
    config = case.config(variant)
    optimizer = make_optimizer(config)
    spec = make_state_spec(config, optimizer, single_device_mesh())
    step = make_step(spec.graphdef, optimizer, make_schedule(config))
    compiled = jax.jit(lambda state, rows: step(state, batch_of(rows)), donate_argnums=0)
    held = {"state": spec.init(None)}
    rows = jax.device_put(case.tokens(case.length + 1))

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            held["state"], metrics = compiled(held["state"], rows)
        jax.block_until_ready((held["state"], metrics))
        return time.perf_counter() - start

    return round_


def _peer_round(case: Case, steps: int) -> Round:
    torch, transformers = import_peers()
    shape = transformers.Qwen2Config(
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen2ForCausalLM(shape).float().train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.9999), weight_decay=0.1, fused=True)
    # transformers shifts the labels itself: length + 1 tokens in would be one position more than ours.
    tokens = torch.from_numpy(case.tokens(case.length).astype(np.int64)).to(device)
    run = torch.compile(model) if device == "cuda" else model

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = run(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return round_
