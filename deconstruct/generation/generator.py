"""Text from a model, decoded with each variant's own cache or state.

All sequences of a batch advance together. One whose prompt is longer than the shortest is fed its own tokens while the
others already sample, so prompts of unequal length need neither padding nor masks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.data import tokenizer
from deconstruct.distributed.sharding import constrain
from deconstruct.generation.sampling import Sampling, choose, choose_greedily
from deconstruct.model import decode
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError

LARGEST = 2**24  # of what is counted: beyond, sizes of arrays no longer fit the compiler, which ends the process
CACHE_STEP = 128  # cache lengths are multiples of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode; the flags of the verb, by the same names."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()
    batch_size: int = 8

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        rules = {
            "max_new_tokens": (1 <= self.max_new_tokens <= LARGEST, f"must lie in [1, {LARGEST}]"),
            "temperature": (0 <= self.temperature < math.inf, "must be finite, and not negative"),
            "top_k": (self.top_k >= 0, "must not be negative (0: all)"),
            "top_p": (0 < self.top_p <= 1, "must lie in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "must lie in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "must be finite, and positive (1: none)"),
            "samples": (1 <= self.samples <= LARGEST, f"must lie in [1, {LARGEST}]"),
            "batch_size": (1 <= self.batch_size <= LARGEST, f"must lie in [1, {LARGEST}]"),
            "seed": (0 <= self.seed < 2**31, "must lie in [0, 2^31)"),
        }
        drawn = "greedy decoding draws nothing; add --temperature=1"
        for name in ("top_k", "top_p", "min_p", "seed", "samples") if self.temperature == 0 else ():
            rules.setdefault(f"{name} ", (getattr(self, name) == getattr(Settings, name), drawn))
        for name, (holds, what) in rules.items():
            if not holds:
                raise UserError(f"--{name.strip().replace('_', '-')}={getattr(self, name.strip())}: {what}")


@dataclasses.dataclass
class Request:
    """One sequence: its prompt, and what has come out so far. `stop` is why it ended: length, stop or end_of_text."""

    prompt: str
    tokens: list[int]
    seed: int
    sample: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    stop: str = ""


class Generator:
    """Decodes requests with one model; compiled programs are kept for batches and cache lengths met before."""

    def __init__(self, model: LanguageModel, text: tokenizer.Tokenizer, settings: Settings):
        self.model, self.text, self.settings = model, text, settings
        self._decoders = functools.lru_cache(maxsize=8)(self._decoder)

    def generate(self, requests: Sequence[Request], on_text: Callable[[Request, str], None] | None = None) -> None:
        """Fills in `output`, `text` and `stop` of each request; prompts of like length share a batch.

        `on_text` is called with each new piece of text. Raises UserError for a prompt the model cannot take.
        """
        for request in requests:
            self._check(request)
        ordered = sorted(requests, key=lambda request: len(request.tokens))
        for start in range(0, len(ordered), self.settings.batch_size):
            self._batch(ordered[start : start + self.settings.batch_size], on_text)

    def _check(self, request: Request) -> None:
        vocabulary = self.model.config.vocab_size
        if not request.tokens:
            raise UserError("the prompt is empty; give at least one token")
        unknown = [token for token in request.tokens if not 0 <= token < vocabulary]
        if unknown:
            raise UserError(f"prompt token {unknown[0]} is unknown; this model has the ids 0 to {vocabulary - 1}")
        needed = len(request.tokens) + self.settings.max_new_tokens
        new = self.settings.max_new_tokens
        self.model.check_length(needed, f"a prompt of {len(request.tokens)} tokens and --max-new-tokens={new}")

    def _decoder(self, batch: int, length: int, greedy: bool) -> decode.Decoder:
        rows = jnp.arange(batch)

        def take(
            logits: jax.Array, tokens: jax.Array, position: Any, seen: jax.Array, inputs: tuple[jax.Array, Sampling]
        ) -> tuple[jax.Array, jax.Array]:
            """[B, 1]: the next token of each prompt where there is one, else (forced < 0) a new one; and what has been
            seen, bool [B, V]."""
            forced, sampling = inputs
            seen = constrain(seen.at[rows[:, None], tokens].set(True), ("batch", None))
            chosen = choose_greedily(logits, seen, sampling) if greedy else choose(logits, seen, sampling, position)
            return constrain(jnp.where(forced >= 0, forced, chosen)[:, None], ("batch", None)), seen

        return decode.Decoder(self.model, batch, length, take)

    def _batch(self, requests: list[Request], on_text: Callable[[Request, str], None] | None) -> None:
        settings, config = self.settings, self.model.config
        prompts = [request.tokens for request in requests]
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        end = longest + settings.max_new_tokens
        length = -(-end // CACHE_STEP) * CACHE_STEP
        if self.model.fixed is not None:
            length = min(length, config.fixed_length)
        decoder = self._decoders(len(requests), length, settings.temperature == 0)
        sampling = self._sampling(requests)

        def inputs(position: int) -> tuple[np.ndarray, Sampling]:
            forced = [p[position] if position < len(p) else -1 for p in prompts]
            return np.array(forced, np.int32), sampling

        first = jnp.asarray([prompt[:shortest] for prompt in prompts], jnp.int32)
        seen = jnp.zeros((len(requests), config.vocab_size), bool)
        tokens, cache, seen = decoder.prefill(first, seen, inputs(shortest))
        for position in range(shortest + 1, end):
            pending = tokens
            tokens, cache, seen = decoder.extend(tokens, cache, seen, inputs(position))
            # Read one step late: the device already works on the next token.
            if not self._take(requests, np.asarray(pending)[:, 0], position - 1, on_text):
                return
        self._take(requests, np.asarray(tokens)[:, 0], end - 1, on_text)

    def _sampling(self, requests: list[Request]) -> Sampling:
        settings, count = self.settings, len(requests)
        return Sampling(
            temperature=jnp.full(count, settings.temperature, jnp.float32),
            top_k=jnp.full(count, settings.top_k, jnp.int32),
            top_p=jnp.full(count, settings.top_p, jnp.float32),
            min_p=jnp.full(count, settings.min_p, jnp.float32),
            penalty=jnp.full(count, settings.repetition_penalty, jnp.float32),
            seed=jnp.asarray([request.seed for request in requests], jnp.uint32),
        )

    def _take(
        self, requests: list[Request], tokens: np.ndarray, position: int, on_text: Callable[[Request, str], None] | None
    ) -> bool:
        """Adds a step's tokens to the requests that still run; False where none does any more."""
        for request, token in zip(requests, tokens.tolist(), strict=True):
            if request.stop or position < len(request.tokens):
                continue
            if token == self.text.end_of_text:
                request.stop = "end_of_text"
            else:
                request.output.append(token)
                if len(request.output) == self.settings.max_new_tokens:
                    request.stop = "length"
            self._say(request, on_text)
        return not all(request.stop for request in requests)

    def _say(self, request: Request, on_text: Callable[[Request, str], None] | None) -> None:
        text = self.text.decode(request.output)
        found = [text.index(stop) for stop in self.settings.stop if stop in text]
        if found:
            text, request.stop = text[: min(found)], "stop"
        if not request.stop:
            # Held back: a character whose bytes have not all come, and what may turn out to be a stop string.
            text = text.rstrip("\ufffd")
            text = text[: len(text) - _possible_stop(text, self.settings.stop)]
        if len(text) > len(request.text):
            if on_text:
                on_text(request, text[len(request.text) :])
            request.text = text


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text begin a stop string."""
    sizes = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(sizes, default=0)
