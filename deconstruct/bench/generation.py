"""Tokens a second of greedy decoding, alone or beside transformers' `generate` with the same weights.

Both decode in float32 on the CPU, from token ids to token ids: neither makes text.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from deconstruct.bench.rounds import Case, import_peers, speeds, take_turns
from deconstruct.generation.generator import Generator, Request, Settings
from deconstruct.interop.huggingface import config_json, flat, stored
from deconstruct.model.language_model import LanguageModel, build_model
from deconstruct.model.placement import split_model
from deconstruct.model.restack import to_layers

PROMPT, NEW = 32, 96


class _NoText:
    """In place of a tokenizer: no text, and no end of it."""

    end_of_text = -1

    def decode(self, tokens: Any) -> str:
        return ""


def generation_speed(case: Case, batch: int, variant: str, peers: bool, rounds: int) -> dict[str, Any]:
    """Rounds of NEW tokens for each of `batch` sequences, after prompts of PROMPT. `same_tokens`: whether the peer's
    are ours."""
    case = case._replace(batch=batch, length=PROMPT + NEW)
    model = build_model(case.config(variant).model)
    prompts = case.tokens(PROMPT)
    ours = Ours(model, prompts)
    contenders: dict[str, Any] = {"deconstruct": ours}
    if peers:
        contenders["transformers"] = Theirs(model, prompts)
    seconds = take_turns(contenders, rounds, case.name)
    found = {"variant": variant, **speeds(case, seconds, batch * NEW)}
    if peers:
        found["same_tokens"] = bool((ours.tokens == contenders["transformers"].tokens).all())
    return found


class Ours:
    """A round that keeps the tokens it made, int [batch, NEW]."""

    def __init__(self, model: LanguageModel, prompts: np.ndarray):
        settings = Settings(max_new_tokens=NEW, batch_size=len(prompts))
        self.generator, self.prompts = Generator(model, _NoText(), settings), prompts  # type: ignore[arg-type]
        self.tokens = np.zeros((0,))

    def __call__(self) -> float:
        requests = [Request("", prompt.tolist(), 0) for prompt in self.prompts]
        start = time.perf_counter()
        self.generator.generate(requests)
        taken = time.perf_counter() - start
        self.tokens = np.array([request.output for request in requests])
        return taken


class Theirs:
    def __init__(self, model: LanguageModel, prompts: np.ndarray):
        self.torch, transformers = import_peers()
        shape = transformers.Qwen2Config(**config_json(model.config, "float32", PROMPT + NEW))
        self.model = transformers.Qwen2ForCausalLM(shape).float().eval()
        _, params, _ = split_model(model)
        arrays = flat({"params": to_layers(params, model.config.plan)})
        entries = {names: stored(names, x.shape, model.config.vocab_size) for names, x in arrays.items()}
        weights = {
            entry.name: self.torch.from_numpy(entry.write(np.asarray(arrays[names])).copy())
            for names, entry in entries.items()
        }
        self.model.load_state_dict(weights, strict=not model.config.tie_embeddings)
        self.model.generation_config.eos_token_id = None
        self.prompts = self.torch.from_numpy(prompts.astype(np.int64))
        self.tokens = np.zeros((0,))

    def __call__(self) -> float:
        start = time.perf_counter()
        with self.torch.no_grad():
            out = self.model.generate(
                self.prompts,
                attention_mask=self.torch.ones_like(self.prompts),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        taken = time.perf_counter() - start
        self.tokens = out[:, PROMPT:].numpy()
        return taken
