"""Prepared rows -> windows and batches.

The batch of a step is a pure function of (fingerprint, seed, length, batch size, step): position i of the endless
stream of windows is window shuffle_e(i mod N) of epoch e = i // N, step s takes the positions [s * B, s * B + B), and
host p of P reads the p-th block of B / P of them. So a run resumes at a step number alone, on any number of hosts.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from array_record.python import array_record_module
from grain.experimental import index_shuffle

from deconstruct.data.manifest import Manifest, Split, check_shards, load_manifest, sha256_of
from deconstruct.paths import is_remote, stat
from deconstruct.types import RunError, UserError

__all__ = ["Batches", "Manifest", "Windows", "load_manifest", "tokens_at", "train_batches"]

SHUFFLE_ROUNDS = 4
ENDLESS = 2**62
LOOK_SECONDS = 10.0  # how often a shard in use is looked at, whether it is still the same


class Windows:
    """Random access to one split: window n is int32 [length + 1], the tokens [n * length, n * length + length] of the
    stream. `len` counts the windows that the rows cover. `fingerprint` is the data's. Safe for threads.

    Raises UserError for a folder that is not prepared or damaged, and a length above the tokens of the split.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, length: int):
        self.manifest = load_manifest(folder)
        self.fingerprint = self.manifest.fingerprint
        self.length = length
        self._rows = _Rows(folder, self.manifest, self.manifest.split(split))
        covered = len(self._rows) * self.manifest.row_length
        if length < 1:
            raise UserError(f"sequence_length={length}: must be at least 1")
        if length > covered:
            raise UserError(
                f"sequence_length={length}: the {split} split of {folder} has only {covered} tokens in rows; "
                f"use sequence_length={covered} or less, or prepare more text"
            )
        self._size = covered // length

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        return self.read([index.__index__()])[0]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Several windows at once: int32 [len(indices), length + 1]. IndexError outside 0 to len."""
        length, row_length = self.length, self.manifest.row_length
        spans = []
        for n in indices:
            if not 0 <= n < self._size:
                raise IndexError(f"window {n} of {self._size}")
            spans.append(range(n * length // row_length, (n * length + length - 1) // row_length + 1))
        rows = iter(self._rows.read(list(itertools.chain.from_iterable(spans))))
        windows = np.empty((len(indices), length + 1), np.int32)
        for window, n, span in zip(windows, indices, spans, strict=True):
            for r in span:
                first = n * length - r * row_length  # where the window begins, counted in this row
                if first >= 0:
                    part = next(rows)[first : first + length + 1]
                    window[: len(part)] = part
                else:
                    part = next(rows)[: first + length + 1]
                    window[-first : -first + len(part)] = part
        return windows


class Batches:
    """An endless iterator of int32 [batch_size // hosts, length + 1], read ahead by threads. Close it when done
    (`close()` or `with`). `step` is the step of the batch that comes next."""

    def __init__(self, source: _Steps, start_step: int, threads: int, prefetch: int):
        self.step = start_step
        self._source = source
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        batch = next(self._batches)
        self.step += 1
        return batch

    def of_step(self, step: int) -> tuple[list[int], np.ndarray]:
        """Which windows the batch of a step from the first on is made of, and their rows, read again."""
        windows = self._source.windows_of(step)
        return windows, self._source.read(windows)

    def close(self) -> None:
        """Ends the threads; a second call does nothing."""
        self._batches.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    folder: str | os.PathLike[str], length: int, batch_size: int, seed: int, start_step: int = 0,
    host: int = 0, hosts: int = 1, threads: int = 3, prefetch: int = 16,
) -> Batches:  # fmt: skip
    """The batches of host `host` of `hosts`, from the one of step `start_step` on: int32
    [batch_size // hosts, length + 1] of shuffled train windows, every epoch in another order, without end.

    Beginning at a late step costs nothing. `prefetch` counts batches. Raises UserError where hosts does not divide
    batch_size, and for what `Windows` raises.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    if batch_size % hosts:
        above = -(-batch_size // hosts) * hosts
        raise UserError(f"batch_size={batch_size}: not divisible by the {hosts} hosts; use batch_size={above}")
    if not 0 <= host < hosts or start_step < 0:
        raise ValueError(f"host={host} of hosts={hosts}, start_step={start_step}")
    source = _Steps(Windows(folder, "train", length), batch_size, seed, start_step, host, hosts)
    return Batches(source, start_step, threads, prefetch)


def tokens_at(folder: str | os.PathLike[str], count: int) -> np.ndarray:
    """The first `count` tokens of the train stream, int32 [count]; UserError where the rows hold fewer."""
    manifest = load_manifest(folder)
    rows = _Rows(folder, manifest, manifest.train)
    held = len(rows) * manifest.row_length + 1
    if count > held:
        raise UserError(f"{folder}: {count} tokens asked for, the train split holds {held} in rows; prepare more text")
    read = rows.read(list(range(max(1, -(-(count - 1) // manifest.row_length)))))
    return np.concatenate([*(row[:-1] for row in read), *(row[-1:] for row in read[-1:])])[:count].astype(np.int32)


class _Steps:
    """The batches of one host as a random access source for grain: element i is the batch of step start + i."""

    def __init__(self, windows: Windows, batch_size: int, seed: int, start: int, host: int, hosts: int):
        self._windows, self._start, self._batch_size = windows, start, batch_size
        self._size = batch_size // hosts
        self._offset = host * self._size
        # The seed of an epoch hangs on the data as well, so that other data is not met in the same order.
        name = f"{windows.fingerprint} {seed}"
        self._epoch_seed = functools.lru_cache(maxsize=8)(functools.partial(_epoch_seed, name))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        return self.read(self.windows_of(self._start + index.__index__()))

    def read(self, windows: list[int]) -> np.ndarray:
        return self._windows.read(windows)

    def windows_of(self, step: int) -> list[int]:
        first = step * self._batch_size + self._offset
        windows = len(self._windows)
        chosen = []
        for position in range(first, first + self._size):
            epoch, place = divmod(position, windows)
            chosen.append(index_shuffle(place, windows - 1, self._epoch_seed(epoch), SHUFFLE_ROUNDS))
        return chosen


def _epoch_seed(name: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {epoch}".encode()).digest()[:4], "little")


class _Rows:
    """Rows of one split by their number, over its shards, which are opened when first read."""

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, split: Split):
        if os.fspath(folder).startswith("s3://"):
            raise UserError(
                f"{folder}: rows are read from files or gs:// (ArrayRecord reads nothing else); copy the folder first "
                f"(aws s3 sync {folder} FOLDER), or mount the bucket"
            )
        self._paths = check_shards(folder, split)
        self._shards, self._vocab_size = split.shards, manifest.tokenizer["vocab_size"]
        self._ends = list(itertools.accumulate(shard.rows for shard in split.shards))
        self._dtype, self._row_bytes = np.dtype(manifest.dtype), manifest.row_bytes
        self._readers: list[Any] = [None] * len(self._paths)
        self._stats = [None if is_remote(path) else stat(path) for path in self._paths]
        self._looked = [time.monotonic()] * len(self._paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, rows: list[int]) -> list[np.ndarray]:
        """The rows, each [row_length + 1], as stored. Raises UserError, or RunError of a bucket, naming the shard where
        one cannot be read."""
        if len(self._paths) == 1:
            return self._read_shard(0, rows)
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(bisect.bisect_right(self._ends, row), []).append(place)
        found: list[Any] = [None] * len(rows)
        for shard, of_shard in places.items():
            begin = self._ends[shard - 1] if shard else 0
            read = self._read_shard(shard, [rows[place] - begin for place in of_shard])
            for place, values in zip(of_shard, read, strict=True):
                found[place] = values
        return found

    def _read_shard(self, shard: int, rows: list[int]) -> list[np.ndarray]:
        if time.monotonic() - self._looked[shard] > LOOK_SECONDS or self._readers[shard] is None:
            self._check_unchanged(shard)
        try:
            records = self._reader(shard).read(rows)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            why = str(error).splitlines()[0]
            if is_remote(self._paths[shard]):  # the network, more likely: nothing is to be deleted for that
                raise RunError(f"{self._paths[shard]}: cannot be read ({why}); the same command tries again") from None
            raise self._damaged(shard, why) from None
        if len(records) != len(rows) or any(len(record) != self._row_bytes for record in records):
            raise self._damaged(shard, f"rows are not of {self._row_bytes} bytes")
        read = [np.frombuffer(record, self._dtype) for record in records]
        for row, values in zip(rows, read, strict=True):
            if (greatest := int(values.max())) >= self._vocab_size:
                raise self._damaged(
                    shard,
                    f"row {row} holds token id {greatest}, and its tokenizer has the ids 0 to {self._vocab_size - 1}",
                )
        return read

    def _reader(self, shard: int) -> Any:
        if self._readers[shard] is None:
            with self._lock:
                if self._readers[shard] is None:
                    # Reading ahead in the file would be wasted: rows are read in shuffled order.
                    path = os.fspath(self._paths[shard])
                    self._readers[shard] = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
        return self._readers[shard]

    def _check_unchanged(self, shard: int) -> None:
        """Raises UserError where a file was replaced or written to since this object was made."""
        path, before = self._paths[shard], self._stats[shard]
        if before is None:
            return
        try:
            now = stat(path)
        except FileNotFoundError:
            raise self._damaged(shard, "deleted while it was in use") from None
        if now != before and sha256_of(os.fspath(path), now) != self._shards[shard].sha256:
            raise self._damaged(shard, "changed while it was in use")
        self._stats[shard], self._looked[shard] = now, time.monotonic()

    def _damaged(self, shard: int, why: str) -> UserError:
        path = self._paths[shard]
        again = f"delete {path.parent} and run: deconstruct prepare --output={path.parent}"
        return UserError(f"{path}: damaged ({why}); {again}")
