"""What the worker processes of prepare do: read a unit, and sample it or turn it into a part of tokens.

A part is three files: NUMBER.tokens (the ids, each document followed by the end of text), NUMBER.npy (one record a
document) and NUMBER.json (counts), which is written last: where it is, the part is whole.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deconstruct.data.progress import take_all
from deconstruct.data.sample import Sample, draw
from deconstruct.data.sources import BadLine, Unit, documents
from deconstruct.data.tokenizer import Tokenizer, load

TABLE = np.dtype([("tokens", "<i8"), ("characters", "<i8"), ("bytes", "<i8"), ("draw", "<u8")])
EXAMPLES = 20
TELL_CHARACTERS = 200_000

_counter: Any = None  # shared by the processes: documents, characters


class Crew:
    """Workers that share a counter of documents and characters. A context manager; leaving it ends them."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self._counter = context.Array("q", 2)
        self._executor: Executor
        if workers == 1:
            self._executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(self._counter, False))
        else:
            self._executor = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_begin, initargs=(self._counter, True)
            )

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=kind is not None)

    def map(
        self, function: Callable[..., Any], jobs: list[tuple], what: str, take: Callable[[Any], object] = bool
    ) -> None:
        """Hands function(*job) of each job to `take`, in the order in which they end, with the progress shown."""
        self._counter[:] = [0, 0]
        futures: set[Future] = {self._executor.submit(function, *job) for job in jobs}
        take_all(futures, what, lambda: (self._counter[0], self._counter[1]), take)


def sample_unit(unit: Unit, characters: int, seed: int) -> Sample:
    """The part of a unit's text that may be in a sample of so many characters over all units."""
    sample = Sample(characters, seed)
    tell = _Teller()
    for item in documents(unit):
        if isinstance(item, str):
            sample.add(item)
            tell(len(item))
    tell.now()
    return sample


def encode_unit(unit: Unit, number: int, folder: str, tokenizer_folder: str, seed: int) -> None:
    """Writes the part of one unit into the folder."""
    tell = _Teller()
    with PartWriter(folder, number, load(tokenizer_folder)) as writer:
        for item in documents(unit):
            if isinstance(item, BadLine):
                writer.bad(item)
            else:
                writer.add(item, draw(item, seed))
                tell(len(item))
    tell.now()


class PartWriter:
    """Writes one part; the caller says each document's draw. Leaving the context without error makes it whole."""

    def __init__(self, folder: str | Path, number: int, tokenizer: Tokenizer):
        self._stem, self._tokenizer = Path(folder) / f"{number:05d}", tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._table = [array("q"), array("q"), array("q"), array("Q")]
        self._bad, self._examples = 0, list[str]()

    def __enter__(self) -> PartWriter:
        self._file = open(self._named(".tokens.unfinished"), "wb")
        return self

    def add(self, text: str, place: int) -> None:
        """One document: its ids and the end of text."""
        ids = self._tokenizer.encode(text)
        ids.append(self._tokenizer.end_of_text)
        self._file.write(np.array(ids, self._dtype).tobytes())
        for column, value in zip(self._table, (len(ids), len(text), len(text.encode()), place), strict=True):
            column.append(value)

    def bad(self, line: BadLine) -> None:
        """Counts a line that is no document."""
        self._bad += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(str(line))

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is not None:
            return
        table = np.empty(len(self._table[0]), TABLE)
        for name, column in zip(TABLE.names or (), self._table, strict=True):
            table[name] = column
        with open(self._named(".npy"), "wb") as file:
            np.save(file, table)
        os.replace(self._named(".tokens.unfinished"), self._named(".tokens"))
        summary = {"documents": len(table), "bad": self._bad, "examples": self._examples}
        self._named(".json.unfinished").write_text(json.dumps(summary), encoding="utf-8")
        os.replace(self._named(".json.unfinished"), self._named(".json"))

    def _named(self, suffix: str) -> Path:
        return self._stem.parent / (self._stem.name + suffix)


class Part:
    """A whole part, read back: `summary`, `table` (a record a document), `tokens` (mapped, not read)."""

    def __init__(self, folder: str | Path, number: int, dtype: str):
        stem = Path(folder) / f"{number:05d}"
        self.summary: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        self._stem, self._dtype = stem, dtype

    @property
    def table(self) -> np.ndarray:
        return np.load(self._stem.with_suffix(".npy"))

    @property
    def tokens(self) -> np.ndarray:
        path = self._stem.with_suffix(".tokens")
        if not path.stat().st_size:
            return np.empty(0, self._dtype)
        return np.memmap(path, dtype=self._dtype, mode="r")


def part_is_whole(folder: str | Path, number: int) -> bool:
    """Whether this part was written to its end, in this run or an earlier one."""
    return (Path(folder) / f"{number:05d}.json").is_file()


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _begin(counter: Any, is_process: bool) -> None:
    global _counter
    _counter = counter
    if is_process:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core already
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class _Teller:
    """Adds to the shared counter, not oftener than its lock allows without cost."""

    def __init__(self) -> None:
        self._documents = self._characters = 0

    def __call__(self, characters: int) -> None:
        self._documents += 1
        self._characters += characters
        if self._characters >= TELL_CHARACTERS:
            self.now()

    def now(self) -> None:
        with _counter.get_lock():
            _counter[0] += self._documents
            _counter[1] += self._characters
        self._documents = self._characters = 0
