"""A model as lm-evaluation-harness wants it: log-likelihoods of continuations and of whole texts, and greedy text.

Rows are padded to one of a few lengths (powers of two, and the longest), so that few programs are compiled; what a row
is padded with has no influence on it. Texts are read after the end of text that stands before every document in
training. Of what is longer than `max_length` tokens, the end is kept, as the harness's own models do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from deconstruct.data.tokenizer import Tokenizer
from deconstruct.evaluate.token_scores import TokenScores
from deconstruct.model.decode import Decoder
from deconstruct.model.language_model import LanguageModel
from deconstruct.types import UserError

SHORTEST = 32  # tokens of the shortest rows
NEW_TOKENS = 256  # of a greedy text, where the task does not say

Pair = tuple[list[int], list[int]]  # a context and what follows it


class HarnessModel(TemplateLM):
    """One for all checkpoints of a run: `model` is the one that answers. `max_length` counts the tokens it reads."""

    model: LanguageModel

    def __init__(self, tokenizer: Tokenizer, max_length: int, mesh: jax.sharding.Mesh, tokens_per_batch: int = 16_384):
        super().__init__()
        self.text, self.max_length = tokenizer, max_length
        self._scores = TokenScores(mesh, tokens_per_batch)
        powers = (SHORTEST << n for n in range(max_length.bit_length()))
        self._lengths = [*(length for length in powers if length < max_length), max_length]

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text: every token once, in windows that do not overlap in what they foretell."""
        windows: list[Pair] = []
        ends = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += map(make_disjoint_window, cut)
            ends.append(len(windows))
        nats = [loglik for loglik, _ in self._score(windows)]
        return [sum(nats[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation: its nats, and whether it is what would be chosen greedily."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for length in self._lengths:
            chosen = [n for n, pair in enumerate(pairs) if self._length_of(pair) == length]
            if not chosen:
                continue
            rows = np.zeros((len(chosen), length + 1), np.int32)
            ends = []
            for row, n in zip(rows, chosen, strict=True):
                context, continuation = pairs[n]
                tokens = [*context, *continuation][-(self.max_length + 1) :]
                row[: len(tokens)] = tokens
                ends.append(len(tokens) - 1)
            scores = self._scores(self.model, rows[:, :-1], rows[:, 1:])
            for row_number, (n, end) in enumerate(zip(chosen, ends, strict=True)):
                here = slice(end - len(pairs[n][1]), end)
                logliks, greedy = scores.logliks[row_number, here], scores.chosen[row_number, here]
                found[n] = float(logliks.sum(dtype=np.float64)), bool(greedy.all())
        return found

    def _length_of(self, pair: Pair) -> int:
        context, continuation = pair
        if len(continuation) > self.max_length:
            raise UserError(
                f"an answer of {len(continuation)} tokens is longer than the {self.max_length} that this model was "
                "trained to read (config.sequence_length); leave this task out"
            )
        needed = len(context) + len(continuation) - 1
        return next((length for length in self._lengths if needed <= length), self.max_length)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first of its `until`."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError("generate_until: this model is decoded greedily; leave do_sample and temperature out")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        new = min(settings.get("max_gen_toks", NEW_TOKENS), self.max_length - 1)
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new) :]
        decoder = Decoder(self.model, 1, self.max_length)
        logits, cache = _read(decoder, tokens)
        output: list[int] = []
        while len(output) < new and (token := int(logits[0].argmax())) != self.eot_token_id:
            output.append(token)
            text = self.text.decode(output)
            if any(stop in text for stop in stops):
                return min((text.partition(stop)[0] for stop in stops), key=len)
            logits, cache, _ = decoder.extend(jnp.array([[token]], jnp.int32), cache)
        return self.text.decode(output)


def _read(decoder: Decoder, tokens: list[int]) -> tuple[Any, Any]:
    """Logits and cache after a prompt, read in pieces of a power of two, so that few programs are compiled."""
    logits = cache = None
    while tokens:
        size = 1 << (len(tokens).bit_length() - 1)
        piece, tokens = jnp.array([tokens[:size]], jnp.int32), tokens[size:]
        logits, cache, _ = decoder.prefill(piece) if cache is None else decoder.extend(piece, cache)
    return logits, cache
