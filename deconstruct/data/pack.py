"""Parts of tokens -> two streams -> rows of fixed length in ArrayRecord shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deconstruct.data.encode import Part
from deconstruct.data.manifest import Shard, Split
from deconstruct.data.split import last_validation_draw
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


class Packer:
    """Splits the documents, validation holding at least `fraction` of the tokens, and writes the shards of both."""

    def __init__(self, parts: list[Part], fraction: float, row_length: int, vocab_size: int, dtype: str):
        self._parts, self._row_length, self._vocab_size, self._dtype = parts, row_length, vocab_size, dtype
        self._last_draw = last_validation_draw(lambda: (part.table for part in parts), fraction)
        self.totals = self._count()
        for name in SPLITS:
            self._check(name, fraction)

    def rows(self, name: str) -> int:
        """How many rows a split has."""
        return (self.totals[name].tokens - 1) // self._row_length

    def shard_names(self) -> list[str]:
        """The names of the files that `write` writes."""
        return [name for split in SPLITS for name, _ in self._shards(split)]

    def write(self, folder: Path, publish: Callable[[Path], None]) -> tuple[dict[str, Split], dict[str, np.ndarray]]:
        """Writes shards into the folder, one at a time, and hands each over when it is whole.

        Returns the splits and how often each id is predicted in their rows.
        """
        splits, counts = {}, {}
        for name in SPLITS:
            total = self.totals[name]
            writer = _RowWriter(folder, publish, self._shards(name), self._row_length, self._vocab_size, self._dtype)
            for tokens in self._stream(name):
                writer.add(tokens)
            shards = writer.finish()
            splits[name] = Split(
                total.documents, total.characters, total.bytes, total.tokens, self.rows(name), tuple(shards)
            )
            counts[name] = writer.counts
        return splits, counts

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
                chosen = table[self._is_in(name, table)]
                total = totals[name]
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

    def _is_in(self, name: str, table: np.ndarray) -> np.ndarray:
        is_validation = table["draw"] <= self._last_draw
        return is_validation if name == "validation" else ~is_validation

    def _stream(self, name: str) -> Iterator[np.ndarray]:
        """The tokens of the split, in the order of the documents, in runs of neighbours."""
        for part in self._parts:
            table = part.table
            ends = np.concatenate([[0], np.cumsum(table["tokens"])])
            inside = np.concatenate([[False], self._is_in(name, table), [False]])
            changes = np.flatnonzero(inside[1:] != inside[:-1])
            yield from part.blocks(((int(ends[a]), int(ends[b])) for a, b in changes.reshape(-1, 2)), BLOCK_TOKENS)


def unigram_perplexity(train: np.ndarray, validation: np.ndarray) -> float:
    """exp of the mean of -log((train[i] + 1) / (sum(train) + V)) over the validation tokens i. Counts are [V]."""
    log_probability = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(np.exp(-(validation * log_probability).sum() / validation.sum()))


class _RowWriter:
    """Cuts a stream into rows and rows into shards. `counts` [V]: how often each id is predicted."""

    def __init__(
        self, folder: Path, publish: Callable[[Path], None], shards: list[tuple[str, int]],
        row_length: int, vocab_size: int, dtype: str,
    ):  # fmt: skip
        self._folder, self._publish, self._coming = folder, publish, iter(shards)
        self._row_length, self._dtype = row_length, np.dtype(dtype)
        self.counts = np.zeros(vocab_size, np.int64)
        self._kept = np.empty(0, self._dtype)
        self._done: list[Shard] = []
        self._open()

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of the stream."""
        self._kept = np.concatenate([self._kept, tokens])
        rows = (len(self._kept) - 1) // self._row_length
        if rows <= 0:
            return
        for start in range(0, rows * self._row_length, self._row_length):
            if self._rows == self._rows_of_shard:
                self._close()
                self._open()
            self._writer.write(self._kept[start : start + self._row_length + 1].tobytes())
            self._rows += 1
        end = rows * self._row_length
        self.counts += np.bincount(self._kept[1 : end + 1], minlength=len(self.counts))
        self._kept = self._kept[end:].copy()

    def finish(self) -> list[Shard]:
        self._close()
        return self._done

    def _open(self) -> None:
        from array_record.python import array_record_module

        name, self._rows_of_shard = next(self._coming)
        self._rows, self._path = 0, self._folder / name
        self._writer = array_record_module.ArrayRecordWriter(str(self._path), WRITER_OPTIONS)

    def _close(self) -> None:
        self._writer.close()
        with open(self._path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._done.append(Shard(self._path.name, self._rows, size, sha256))
        self._publish(self._path)
