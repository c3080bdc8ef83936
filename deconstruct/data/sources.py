"""Where text comes from: files, folders, a Hugging Face dataset, documents made for recall, or Python's own sources.

An input is resolved into work units, in an order that depends on nothing but the names. A unit is what one worker
reads from its beginning to its end; it yields documents, and a `BadLine` for whatever could not be read as one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deconstruct.data import recall
from deconstruct.data.listing import HUB, File, files_of, kind_of, standard_library
from deconstruct.paths import Stat, is_remote, place, reaching
from deconstruct.types import UserError

# Small text files share a unit, so that a million of them do not become a million parts.
UNIT_BYTES = 1 << 20
MOST_UNITS = 4096
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class BadLine:
    """A line (or file, or row) that is not a document: which one, counted from 1, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time. `characters` stops it early (the last document is cut), None reads all.
    `stats`: of the paths, when they were listed."""

    kind: str  # a value of KINDS, "hub" or "recall"
    paths: tuple[str, ...]
    key: str
    characters: int | None = None
    stats: tuple[Stat, ...] = ()


def work_units(inputs: Iterable[str], key: str = "text") -> list[Unit]:
    """The units of the inputs, in reading order; without an input, those of the Python standard library.

    Raises UserError for a path that is not there, a folder without text, an unknown suffix.
    """
    inputs = list(inputs)
    if not inputs:
        return _units_of_files(standard_library(), key)
    units: list[Unit] = []
    for given in inputs:
        if given.startswith(HUB):
            _hub_parts(given)
            units.append(Unit("hub", (given,), key))
        elif given.startswith(recall.PREFIX):
            units.append(Unit("recall", (recall.PREFIX + recall.parse_recall(given).spelled(),), key))
        else:
            units += _units_of_files(files_of(given), key)
    return units


def identity(units: Iterable[Unit]) -> str:
    """sha256 over the name, size and time of every file: says that the input is the one of the last run."""
    digest = hashlib.sha256()
    for unit in units:
        if unit.kind in ("hub", "recall"):
            digest.update(f"{unit.paths[0]}\n".encode())
            continue
        for path, (size, mark) in zip(unit.paths, unit.stats, strict=True):
            digest.update(f"{unit.kind} {Path(path).name} {size} {mark}\n".encode())
    return digest.hexdigest()


def documents(unit: Unit) -> Iterator[str | BadLine]:
    """Yields each document of a unit that is not empty, and a BadLine for each that cannot be read.

    Raises UserError where the rest of a file would be lost: one that cannot be read on, a compressed file that ends too
    soon, a parquet file without the column, a dataset that cannot be opened.
    """
    left = unit.characters
    for item in _all_documents(unit):
        if isinstance(item, BadLine):
            yield item
        elif item:
            text = item if left is None else item[:left]
            yield text
            if left is not None:
                left -= len(text)
                if left <= 0:
                    return


def capped(units: Iterable[Unit], characters: int) -> list[Unit]:
    """The first units that hold `characters` characters together, the last one of them told where to stop."""
    kept: list[Unit] = []
    left = characters
    for unit in units:
        held = 0
        for item in documents(replace(unit, characters=left)):
            held += len(item) if isinstance(item, str) else 0
        kept.append(replace(unit, characters=left if held >= left else None))
        left -= held
        if left <= 0:
            break
    return kept


def _units_of_files(files: list[File], key: str) -> list[Unit]:
    units: list[Unit] = []
    group: list[File] = []
    held = 0
    most = max(UNIT_BYTES, sum(file.stat.size for file in files) // MOST_UNITS)
    for file in files:
        kind = kind_of(file.path) or "txt"  # the standard library's .py files are text
        if group and (kind != "txt" or held + file.stat.size > most):
            units.append(_unit("txt", group, key))
            group, held = [], 0
        if kind == "txt":
            group.append(file)
            held += file.stat.size
        else:
            units.append(_unit(kind, [file], key))
    if group:
        units.append(_unit("txt", group, key))
    return units


def _unit(kind: str, files: list[File], key: str) -> Unit:
    return Unit(kind, tuple(file.path for file in files), key, stats=tuple(file.stat for file in files))


def _all_documents(unit: Unit) -> Iterator[str | BadLine]:
    for path in unit.paths:
        with reaching(path):  # a network fails in the middle of a file, too
            if unit.kind == "txt":
                yield _text_file(path)
            elif unit.kind == "parquet":
                yield from _parquet(path, unit.key)
            elif unit.kind == "hub":
                yield from _hub(path, unit.key)
            elif unit.kind == "recall":
                yield from recall.documents(recall.parse_recall(path))
            else:
                yield from _json_lines(path, unit.kind, unit.key)


def _text_file(path: str) -> str | BadLine:
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadLine(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8")


def _open(path: str) -> Any:
    """The file's bytes as they are stored."""
    return place(path).open("rb")


def _json_lines(path: str, kind: str, key: str) -> Iterator[str | BadLine]:
    try:
        for number, line in enumerate(_split_lines(_chunks(path, kind)), start=1):
            if line.strip():
                text = _line_text(line, key, first=number == 1)
                yield text if text is not None else BadLine(path, number, _why_bad(line, key))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch or write the file again") from None


def _line_text(line: bytes, key: str, first: bool) -> str | None:
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))[key]
        value.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
        return None
    return value if isinstance(value, str) else None


def _why_bad(line: bytes, key: str) -> str:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(found, dict):
        return "not a JSON object"
    if key not in found:
        return f"no key {key!r} (it has {', '.join(map(repr, list(found)[:5])) or 'none'})"
    return _why_not_text(found[key], f"the value of {key!r}")


def _why_not_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return f"{name} holds half of a surrogate pair, which is not text"
    return f"{name} is {type(value).__name__}, not a string"


def _chunks(path: str, kind: str) -> Iterator[bytes]:
    """The decompressed bytes of a file; EOFError where a compressed one ends before its end mark."""
    if kind == "jsonl.zst":
        yield from _zstd_chunks(path)
        return
    with _open(path) as stored, contextlib.nullcontext(stored) if kind == "jsonl" else gzip.open(stored) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    import zstandard

    # The library's own stream reader takes a cut file for a short one, so frames are followed to their end here.
    frame = None
    with _open(path) as file:
        while data := file.read(CHUNK_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("compressed file ended before its end mark")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        for piece in rest:
            yield b"".join(begun)
            begun = [piece]
    if any(begun):
        yield b"".join(begun)


def _parquet(path: str, key: str) -> Iterator[str | BadLine]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as stored:
            file = pyarrow.parquet.ParquetFile(stored)
            _check_column(path, file.schema_arrow, key)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                for scalar in batch.column(0):
                    number += 1
                    try:
                        value = scalar.as_py()
                    except UnicodeDecodeError:
                        yield BadLine(path, number, "not UTF-8")
                        continue
                    is_text = isinstance(value, str)
                    yield value if is_text else BadLine(path, number, _why_not_text(value, f"column {key!r}"))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or is_remote(path)):
            raise  # of the disk or the network, not of what is in the file
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def _check_column(path: str, schema: Any, key: str) -> None:
    import pyarrow

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())

    if key not in schema.names:
        raise UserError(f"{path}: no column {key!r}; --key should be one of {', '.join(schema.names)}")
    kind = schema.field(key).type
    if not is_text(kind) and not pyarrow.types.is_null(kind):
        others = [field.name for field in schema if is_text(field.type)]
        remedy = f"--key should be one of {', '.join(others)}" if others else "no column of it holds text"
        raise UserError(f"{path}: column {key!r} holds {kind}, not text; {remedy}")


def _hub_parts(given: str) -> tuple[str, str | None, str]:
    name, *rest = given.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"--input={given}: should be {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME:CONFIG:SPLIT")
    return name, (rest[0] if rest else "") or None, (rest[1] if len(rest) > 1 else "") or "train"


def _hub(given: str, key: str) -> Iterator[str | BadLine]:
    name, config, split = _hub_parts(given)
    try:
        import datasets
    except ImportError:
        raise UserError(f"--input={given}: needs the extra hub: pip install 'deconstruct[hub]'") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the library raises a dozen kinds for a wrong name, no network, no permission
        raise UserError(f"--input={given}: cannot be opened: {(str(error).splitlines() or [''])[0]}") from None
    for number, row in enumerate(rows, start=1):
        value = row.get(key)
        if isinstance(value, str):
            yield value
        else:
            yield BadLine(given, number, _why_not_text(value, f"column {key!r}"))
