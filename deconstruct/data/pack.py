"""Parts of tokens -> two streams -> rows of fixed length in ArrayRecord shards, each of which a worker writes alone."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath

from deconstruct.data.crew import Crew
from deconstruct.data.encode import Part, Tell
from deconstruct.data.manifest import Shard, Split
from deconstruct.data.output import Output
from deconstruct.data.split import last_validation_draw
from deconstruct.paths import unfinished_name
from deconstruct.types import UserError

SHARD_BYTES = 128 << 20
# One row a group: any row is read alone. Uncompressed: tokens shrink little, and reading is twice as fast.
WRITER_OPTIONS = "group_size:1,uncompressed"
BLOCK_TOKENS = 1 << 22
SPLITS = ("train", "validation")


@dataclass
class Totals:
    """Of one split's documents."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Cut:
    """What a worker writes: a shard, which has the rows of a split from `first` on. `parts`: those that hold them, each
    with how many tokens of the split lie before it."""

    split: str
    name: str
    first: int
    rows: int
    row_length: int
    dtype: str
    last_draw: np.uint64
    parts: tuple[tuple[int, Part], ...]

    def tokens(self) -> Iterator[np.ndarray]:
        """In the order of the documents, in runs of neighbours."""
        begin = self.first * self.row_length
        end = begin + self.rows * self.row_length + 1
        for before, part in self.parts:
            table = part.table
            inside = np.concatenate([[False], is_in(self.split, table, self.last_draw), [False]])
            runs = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)
            ends = np.concatenate([[0], np.cumsum(table["tokens"])])
            first, last = ends[runs[:, 0]], ends[runs[:, 1]]  # in the part
            place = before + np.concatenate([[0], np.cumsum(last - first)[:-1]])  # of `first` in the split
            low, high = np.maximum(place, begin), np.minimum(place + last - first, end)
            kept = low < high
            spans = zip((first + low - place)[kept].tolist(), (first + high - place)[kept].tolist(), strict=True)
            yield from part.blocks(spans, BLOCK_TOKENS)


def is_in(split: str, table: np.ndarray, last_draw: np.uint64) -> np.ndarray:
    """Of each document of a table, whether it is in the split."""
    is_validation = table["draw"] <= last_draw
    return is_validation if split == "validation" else ~is_validation


def pack_shard(
    number: int, cut: Cut, vocab_size: int, output: Output, partial: epath.Path, *, tell: Tell
) -> tuple[int, Shard, np.ndarray]:
    """Writes a shard and publishes it; returns how often each id is predicted in its rows, int64 [vocab_size]."""
    from array_record.python import array_record_module

    counts, kept = np.zeros(vocab_size, np.int64), np.empty(0, cut.dtype)
    with output.scratch(partial) as folder:
        path = unfinished_name(folder / cut.name)
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for tokens in cut.tokens():
            kept = np.concatenate([kept, tokens])
            end = max(0, len(kept) - 1) // cut.row_length * cut.row_length
            for start in range(0, end, cut.row_length):
                writer.write(kept[start : start + cut.row_length + 1].tobytes())
            counts += np.bincount(kept[1 : end + 1], minlength=vocab_size)
            kept = kept[end:].copy()
        writer.close()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        output.publish(path, cut.name)
    return number, Shard(cut.name, cut.rows, size, sha256), counts


class Packer:
    """Splits the documents, validation holding at least `fraction` of the tokens, and has both written as shards."""

    def __init__(self, parts: list[Part], fraction: float, row_length: int, vocab_size: int, dtype: str):
        self._parts, self._row_length, self._vocab_size, self._dtype = parts, row_length, vocab_size, dtype
        self._last_draw = last_validation_draw(lambda: (part.table for part in parts), fraction)
        self._tokens: dict[str, list[int]] = {name: [] for name in SPLITS}  # of each part
        self.totals = self._count()
        for name in SPLITS:
            self._check(name, fraction)

    def rows(self, name: str) -> int:
        """How many rows a split has."""
        return (self.totals[name].tokens - 1) // self._row_length

    def shard_names(self) -> list[str]:
        """The names of the files that `write` writes."""
        return [name for split in SPLITS for name, _ in self._shards(split)]

    def write(self, crew: Crew, output: Output, partial: epath.Path) -> tuple[dict[str, Split], dict[str, np.ndarray]]:
        """Returns the splits, when all their shards are in the output, and how often each id is predicted in them."""
        cuts = [cut for name in SPLITS for cut in self._cuts(name)]
        shards: dict[str, dict[int, Shard]] = {name: {} for name in SPLITS}
        counts = {name: np.zeros(self._vocab_size, np.int64) for name in SPLITS}

        def take(result: tuple[int, Shard, np.ndarray]) -> None:
            number, shard, predicted = result
            shards[cuts[number].split][number] = shard
            counts[cuts[number].split] += predicted

        jobs = ((number, cut, self._vocab_size, output, partial) for number, cut in enumerate(cuts))
        crew.map(pack_shard, jobs, len(cuts), "pack", take)
        splits = {}
        for name, total in self.totals.items():
            own = tuple(shards[name][number] for number in sorted(shards[name]))
            splits[name] = Split(total.documents, total.characters, total.bytes, total.tokens, self.rows(name), own)
        return splits, counts

    def _cuts(self, split: str) -> Iterator[Cut]:
        before = [0, *itertools.accumulate(self._tokens[split])]
        first = 0
        for name, rows in self._shards(split):
            begin, end = first * self._row_length, (first + rows) * self._row_length + 1
            parts = tuple(
                (before[i], part) for i, part in enumerate(self._parts) if before[i] < end and before[i + 1] > begin
            )
            yield Cut(split, name, first, rows, self._row_length, self._dtype, self._last_draw, parts)
            first += rows

    def _shards(self, split: str) -> list[tuple[str, int]]:
        """The name of each shard, and its rows."""
        rows = self.rows(split)
        shards = max(1, -(-rows * (self._row_length + 1) * np.dtype(self._dtype).itemsize // SHARD_BYTES))
        return [
            (f"{split}-{i:05d}-of-{shards:05d}.array_record", rows * (i + 1) // shards - rows * i // shards)
            for i in range(shards)
        ]

    def _count(self) -> dict[str, Totals]:
        totals = {name: Totals() for name in SPLITS}
        for part in self._parts:
            table = part.table
            for name in SPLITS:
                chosen = table[is_in(name, table, self._last_draw)]
                total = totals[name]
                self._tokens[name].append(int(chosen["tokens"].sum()))
                total.documents += len(chosen)
                total.characters += int(chosen["characters"].sum())
                total.bytes += int(chosen["bytes"].sum())
                total.tokens += int(chosen["tokens"].sum())
        return totals

    def _check(self, name: str, fraction: float) -> None:
        tokens, needed = self.totals[name].tokens, self._row_length + 1
        if not self.totals[name].documents:
            documents = sum(total.documents for total in self.totals.values())
            raise UserError(
                f"--input: its {documents} documents are all the same text, and what is the same stays in one split; "
                "give at least two that differ"
            )
        if tokens < needed:
            remedy = "more text or a smaller --row-length"
            if name == "validation" and fraction < 0.5:
                remedy = "more text, a smaller --row-length or a larger --validation-fraction"
            raise UserError(
                f"--row-length={self._row_length}: the {name} split has {tokens} tokens and a row takes {needed}; "
                f"give {remedy}"
            )


def unigram_perplexity(train: np.ndarray, validation: np.ndarray) -> float:
    """exp of the mean of -log((train[i] + 1) / (sum(train) + V)) over the validation tokens i. Counts are [V]."""
    log_probability = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(np.exp(-(validation * log_probability).sum() / validation.sum()))
