"""What the workers of prepare do: read a unit, and sample it or turn it into a part of tokens.

A part is three files: NUMBER.tokens (the ids, each document followed by the end of text), NUMBER.npy (one record a
document) and NUMBER.json (counts), which is written last: where it is, the part is whole. A unit may be done twice, by
a worker that was given up and by another: both write the same.
"""

from __future__ import annotations

import io
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from deconstruct.data.sample import Sample, draw
from deconstruct.data.sources import BadLine, Unit, documents
from deconstruct.data.tokenizer import Tokenizer, load
from deconstruct.paths import is_remote, place, unfinished_name, write_whole

TABLE = np.dtype([("tokens", "<i8"), ("characters", "<i8"), ("bytes", "<i8"), ("draw", "<u8")])
EXAMPLES = 20

# Told the characters of each document that a worker has done.
Tell = Callable[[int], None]


@dataclass
class Summary:
    """Of some units: documents, lines that are none, and the first of these in words."""

    documents: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Summary) -> None:
        """Counts what another has counted."""
        self.documents += other.documents
        self.bad += other.bad
        self.examples = [*self.examples, *other.examples][:EXAMPLES]

    def spoilt(self, line: BadLine) -> None:
        """Counts a line that is no document."""
        self.bad += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(line))


def sample_unit(unit: Unit, characters: int, seed: int, ceiling: int, *, tell: Tell) -> tuple[Sample, Summary]:
    """The part of a unit's text that may be in a sample of so many characters over all units."""
    sample, summary = Sample(characters, seed, ceiling), Summary()
    for item in documents(unit):
        if isinstance(item, BadLine):
            summary.spoilt(item)
        else:
            summary.documents += 1
            sample.add(item)
            tell(len(item))
    return sample, summary


def encode_unit(unit: Unit, number: int, folder: str, tokenizer_folder: str, seed: int, *, tell: Tell) -> None:
    """Writes the part of one unit into the folder, if it is not there."""
    if part_is_whole(folder, number):
        return
    with PartWriter(folder, number, load(tokenizer_folder)) as writer:
        for item in documents(unit):
            if isinstance(item, BadLine):
                writer.summary.spoilt(item)
            else:
                writer.add(item, draw(item, seed))
                tell(len(item))


class PartWriter:
    """Writes one part; the caller says each document's draw. Leaving the context without error makes it whole."""

    def __init__(self, folder: str | os.PathLike[str], number: int, tokenizer: Tokenizer):
        self._folder, self._number, self._tokenizer = folder, number, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._table = [array("q"), array("q"), array("q"), array("Q")]
        self.summary = Summary()

    def __enter__(self) -> PartWriter:
        tokens = self._named("tokens")
        self._unfinished = tokens if is_remote(tokens) else epath.Path(unfinished_name(tokens))
        self._file = self._unfinished.open("wb")
        return self

    def add(self, text: str, place: int) -> None:
        """One document: its ids and the end of text."""
        ids = self._tokenizer.encode(text)
        ids.append(self._tokenizer.end_of_text)
        self._file.write(np.array(ids, self._dtype).tobytes())
        for column, value in zip(self._table, (len(ids), len(text), len(text.encode()), place), strict=True):
            column.append(value)

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is not None:
            return
        table = np.empty(len(self._table[0]), TABLE)
        for name, column in zip(TABLE.names or (), self._table, strict=True):
            table[name] = column
        self.summary.documents = len(table)
        if self._unfinished != self._named("tokens"):
            self._unfinished.replace(self._named("tokens"))
        written = io.BytesIO()
        np.save(written, table)
        write_whole(self._named("npy"), written.getvalue())
        write_whole(self._named("json"), json.dumps(vars(self.summary)).encode())

    def _named(self, kind: str) -> epath.Path:
        return part_file(self._folder, self._number, kind)


class Part:
    """A whole part, read back: `summary`, `table` (a record a document), `blocks` of its tokens."""

    def __init__(self, folder: str | os.PathLike[str], number: int, dtype: str):
        self._folder, self._number, self._dtype = folder, number, np.dtype(dtype)
        self.summary = Summary(**json.loads(part_file(folder, number, "json").read_bytes()))

    @property
    def table(self) -> np.ndarray:
        with part_file(self._folder, self._number, "npy").open("rb") as file:
            return np.load(file)

    def blocks(self, spans: Iterable[tuple[int, int]], most: int) -> Iterator[np.ndarray]:
        """The tokens of each span [first, last), ascending, in blocks of at most so many."""
        width = self._dtype.itemsize
        with part_file(self._folder, self._number, "tokens").open("rb") as stored:
            file: Any = stored
            for first, last in spans:
                file.seek(first * width)
                for start in range(first, last, most):
                    yield np.frombuffer(file.read((min(start + most, last) - start) * width), self._dtype)


def part_file(folder: str | os.PathLike[str], number: int, kind: str) -> epath.Path:
    """The path of one of a part's files: tokens, npy or json."""
    return place(folder) / f"{number:05d}.{kind}"


def part_is_whole(folder: str | os.PathLike[str], number: int) -> bool:
    """Whether this part was written to its end, in this run or an earlier one."""
    return part_file(folder, number, "json").exists()


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
