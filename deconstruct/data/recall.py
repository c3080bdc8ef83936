"""Documents made to be recalled from: some of their tokens can only be known by looking back.

    mqar        k3 v7 k9 v2 f1 k9 v2 f5 k3 v7 ...    `pairs` keys with a value each; then, `queries` times, a key again:
                                                     its value is the answer (Arora et al. 2023, arXiv:2312.04927)
    induction   k3 k9 k1 f5 f2 k3 k9 k1              `pairs` + 1 keys in a row; then the same again: what followed a
                                                     key follows it (Olsson et al. 2022, arXiv:2209.11895)

A key stands once among what is to be remembered, and fillers, which pad to `length` at random places, are of ids that
are no keys. So in both kinds the answers are what follows a key that stood in the document before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from deconstruct.spelling import nearest, parse_call
from deconstruct.types import UserError

PREFIX = "recall:"
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"
FIRST_KEY = 2  # after these two


@dataclasses.dataclass(frozen=True)
class Recall:
    """How hard it is; whole numbers all. `length` counts the words of a document, without the end of text."""

    kind: ClassVar[str]
    pairs: int = 8
    keys: int = 64  # that there are, of which a document has `pairs` or one more
    values: int = 64
    fillers: int = 64
    length: int = 63
    documents: int = 20_000
    seed: int = 0

    @property
    def needed(self) -> int:
        """Words of a document without fillers."""
        raise NotImplementedError

    @property
    def chosen(self) -> int:
        """Keys that a document has."""
        raise NotImplementedError

    def units(self, draw: np.random.Generator, keys: np.ndarray) -> list[list[int]]:
        """The ids of a document, in groups that no filler comes between."""
        raise NotImplementedError

    def spelled(self) -> str:
        return f"{self.kind}({','.join(f'{name}={value}' for name, value in dataclasses.asdict(self).items())})"

    def words(self) -> list[str]:
        """The vocabulary, by id."""
        groups = (("k", self.keys), ("v", self.values), ("f", self.fillers))
        return [END_OF_TEXT, UNKNOWN, *(f"{letter}{i}" for letter, count in groups for i in range(count))]

    def tokens(self, count: int, stream: int = 0) -> np.ndarray:
        """`count` documents as ids, int32 [count, length]. Another `stream` has others."""
        draw = np.random.default_rng([self.seed, stream])
        return np.array([self._document(draw) for _ in range(count)], np.int32)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        """For ids [B, L]: how often the key at a position stood before it, int32 [B, L]; 0 where it did not, or there
        is no key. Where it is more, the next token is an answer."""
        is_key = (tokens >= FIRST_KEY) & (tokens < FIRST_KEY + self.keys)
        before = np.tril(tokens[:, :, None] == tokens[:, None, :], -1).sum(-1)
        return np.where(is_key, before, 0).astype(np.int32)

    def _document(self, draw: np.random.Generator) -> list[int]:
        keys = FIRST_KEY + draw.choice(self.keys, self.chosen, replace=False)
        units = self.units(draw, keys)
        padding = self.length - self.needed
        first_filler = FIRST_KEY + self.keys + self.values
        fillers = first_filler + draw.integers(0, max(self.fillers, 1), padding)
        gaps = np.sort(draw.integers(0, len(units) + 1, padding))  # before which unit each stands
        document: list[int] = []
        for number in range(len(units) + 1):
            document += fillers[slice(*np.searchsorted(gaps, [number, number + 1]))].tolist()
            document += units[number] if number < len(units) else []
        return document


@dataclasses.dataclass(frozen=True)
class Mqar(Recall):
    kind = "mqar"
    queries: int = 16

    @property
    def needed(self) -> int:
        return 2 * (self.pairs + self.queries)

    @property
    def chosen(self) -> int:
        return self.pairs

    def units(self, draw: np.random.Generator, keys: np.ndarray) -> list[list[int]]:
        values = FIRST_KEY + self.keys + draw.integers(0, self.values, self.pairs)
        # All keys in some order, then all in another: none is asked for twice before each was once.
        rounds = [draw.permutation(self.pairs) for _ in range(-(-self.queries // self.pairs))]
        order = [*range(self.pairs), *np.concatenate(rounds)[: self.queries]]
        return [[int(keys[i]), int(values[i])] for i in order]


@dataclasses.dataclass(frozen=True)
class Induction(Recall):
    kind = "induction"

    @property
    def needed(self) -> int:
        return 2 * self.chosen

    @property
    def chosen(self) -> int:
        return self.pairs + 1

    def units(self, draw: np.random.Generator, keys: np.ndarray) -> list[list[int]]:
        return [keys.tolist()] * 2


KINDS: dict[str, type[Recall]] = {kind.kind: kind for kind in (Mqar, Induction)}


def parse_recall(text: str, base: Recall | None = None) -> Recall:
    """`mqar(pairs=16)` or `induction`, with the prefix or without; what is not said is as in `base`, or its default.

    Raises UserError for what is misspelled or cannot be.
    """
    name, given = parse_call(text.removeprefix(PREFIX), "recall")
    if name not in KINDS:
        raise UserError(f"recall {name!r} is unknown; did you mean {nearest(name, KINDS, 0)}?")
    kind = KINDS[name]
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    for key in given:
        if key not in known:
            raise UserError(f"recall {text!r}: {key} is unknown; its options are {', '.join(known)}")
        if not given[key].isdecimal():
            raise UserError(f"recall {text!r}: {key}={given[key]}: expected a whole number")
    of_base = {key: value for key, value in dataclasses.asdict(base).items() if key in known} if base else {}
    made = kind(**{**of_base, **{key: int(value) for key, value in given.items()}})
    _check(made, text)
    return made


def _check(made: Recall, text: str) -> None:
    least = {"pairs": 1, "queries": 1, "keys": made.chosen, "values": 1, "documents": 2, "length": made.needed}
    least["fillers"] = 1 if made.length > made.needed else 0
    for key, value in dataclasses.asdict(made).items():
        if value < least.get(key, 0):
            raise UserError(f"recall {text!r}: {key}={value}: must be at least {least[key]}")


def documents(recall: Recall) -> Iterator[str]:
    """Each document as words with spaces between them."""
    words = recall.words()
    for tokens in recall.tokens(recall.documents).tolist():
        yield " ".join(words[i] for i in tokens)


def tokenizer_json(recall: Recall) -> bytes:
    """A tokenizer of the `tokenizers` library whose ids are the words."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {word: i for i, word in enumerate(recall.words())}
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }
    return json.dumps(parts, indent=1).encode()
