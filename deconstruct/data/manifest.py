"""What a prepared folder holds: `manifest.json`, written last, names every shard of packed rows.

Row r of a split holds tokens [r * R, r * R + R] of its stream: R + 1 tokens, of which the last is also the first of
the next row, so that a model is asked for each token once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from etils import epath

from deconstruct.paths import Stat, is_remote, place, reaching, stat, write_whole
from deconstruct.types import UserError

FORMAT = 1
FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
PARTIAL = ".partial"  # what a run of prepare that has not finished has done so far
HASHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """One file of rows: its name in the folder, rows, size in bytes, sha256."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One stream. `tokens` counts each end of text; rows cover the first rows * row_length + 1 of them.
    `characters` and `bytes` (UTF-8) are those of its documents."""

    documents: int
    characters: int
    bytes: int
    tokens: int
    rows: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """`unigram_perplexity`: of the validation tokens under the train tokens' frequencies, one added to each count.
    `bad_lines`: count and the first examples. `fingerprint`: sha256 over shards, tokenizer and row length."""

    row_length: int
    dtype: str  # "uint16" or "uint32"
    tokenizer: dict[str, Any]  # kind, file, sha256, vocab_size, end_of_text
    train: Split
    validation: Split
    unigram_perplexity: float
    bad_lines: dict[str, Any]
    options: dict[str, Any]
    input_sha256: str
    one_document: bool = False  # a single document, split at its end
    format: int = FORMAT
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.computed_fingerprint())

    def split(self, name: str) -> Split:
        """The split of this name; UserError for another name than train or validation."""
        if name not in ("train", "validation"):
            raise UserError(f"split={name!r}: should be 'train' or 'validation'")
        return self.train if name == "train" else self.validation

    @property
    def row_bytes(self) -> int:
        return (self.row_length + 1) * np.dtype(self.dtype).itemsize

    def computed_fingerprint(self) -> str:
        """Of what the manifest names."""
        hashes = [shard.sha256 for split in (self.train, self.validation) for shard in split.shards]
        parts = [*hashes, self.tokenizer["sha256"], str(self.row_length)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def save_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Writes manifest.json: it is there whole, or not at all."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n"
    write_whole(place(folder) / FILE_NAME, text.encode())


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder. Raises UserError where prepare has not run, or not to its end, and for a file
    that is not as prepare writes it."""
    path = place(folder) / FILE_NAME
    again = f"run: deconstruct prepare --output={folder}"
    with reaching(folder):
        there = path.exists()
        if not there:
            begun = (path.parent / PARTIAL).exists()
            what = "prepare has not finished here" if begun else "no prepared data here (no manifest.json)"
            raise UserError(f"{folder}: {what}; {again}")
        data = path.read_bytes()
    try:
        return _parsed(data)
    except ValueError as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}; {again} with a new folder") from None
        raise UserError(
            f"{path}: not a manifest of prepare ({error}); prepare the text again, in a new folder"
        ) from None


def check_shards(folder: str | os.PathLike[str], split: Split, *, hashed: int = HASHED_BYTES) -> list[epath.Path]:
    """The shards' paths. Raises UserError naming the first that is missing, not of its size, or not what was written.

    The content is looked at (once a process) where the split is of at most `hashed` bytes and on this machine.
    """
    paths = [place(folder) / shard.name for shard in split.shards]
    look_inside = sum(shard.bytes for shard in split.shards) <= hashed
    for path, shard in zip(paths, split.shards, strict=True):
        again = f"delete {folder} and run: deconstruct prepare --output={folder}"
        try:
            found = stat(path)
        except FileNotFoundError:
            raise UserError(f"{path}: this shard is missing; {again}") from None
        if found.size != shard.bytes:
            raise UserError(f"{path}: damaged, {found.size} bytes where the manifest says {shard.bytes}; {again}")
        if look_inside and not is_remote(path) and sha256_of(os.fspath(path), found) != shard.sha256:
            raise UserError(f"{path}: damaged or changed, its sha256 is not the one in {FILE_NAME}; {again}")
    return paths


@functools.lru_cache(maxsize=1 << 16)
def sha256_of(path: str, found: Stat) -> str:
    """Of a file of this machine, read again only where its size or time is another."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(data: bytes) -> Manifest:
    """Raises ValueError saying what is not as prepare writes it."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is empty" if not data.strip() else "it is not JSON") from None
    if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
        raise UserError(f"format {raw['format']}, this version reads {FORMAT}")
    _require(raw, _KINDS, "")
    _require(raw["tokenizer"], _TOKENIZER_KINDS, "tokenizer.")
    if raw["row_length"] < 1 or raw["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"row_length={raw['row_length']}, dtype={raw['dtype']!r}")
    if raw["tokenizer"]["file"] not in (f"{TOKENIZER_FOLDER}/tokenizer.{end}" for end in ("model", "json")):
        raise ValueError(f"tokenizer.file={raw['tokenizer']['file']!r} is not a tokenizer of this folder")
    for name in ("train", "validation"):
        _require(raw[name], _SPLIT_KINDS, f"{name}.")
        for shard in raw[name]["shards"]:
            _require(shard, _SHARD_KINDS, f"{name}.shards.")
            if not re.fullmatch(rf"{name}-\d+-of-\d+\.array_record", shard["name"]):
                raise ValueError(f"{shard['name']!r} is not the name of a shard in this folder")
        shards = tuple(Shard(**shard) for shard in raw[name]["shards"])
        if not shards or sum(shard.rows for shard in shards) != raw[name]["rows"] or raw[name]["rows"] < 1:
            raise ValueError(f"{name}.rows={raw[name]['rows']} is not the sum over its shards")
        raw[name] = Split(**{**raw[name], "shards": shards})
    manifest = Manifest(**raw)
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise ValueError("its fingerprint is not that of its shards and tokenizer: it was changed")
    return manifest


_NUMBER = (int, float)
_SHARD_KINDS: dict[str, Any] = {"name": str, "rows": int, "bytes": int, "sha256": str}
_SPLIT_KINDS: dict[str, Any] = dict.fromkeys(("documents", "characters", "bytes", "tokens", "rows"), int) | {
    "shards": list
}
_TOKENIZER_KINDS: dict[str, Any] = {"kind": str, "file": str, "sha256": str, "vocab_size": int, "end_of_text": int}
_KINDS: dict[str, Any] = {
    "row_length": int, "dtype": str, "tokenizer": dict, "train": dict, "validation": dict,
    "unigram_perplexity": _NUMBER, "bad_lines": dict, "options": dict, "input_sha256": str, "one_document": bool,
    "format": int, "fingerprint": str,
}  # fmt: skip


def _require(found: Any, kinds: dict[str, Any], where: str) -> None:
    """Raises ValueError where an object has not exactly these keys, with values of these kinds."""
    if not isinstance(found, dict):
        raise ValueError(f"{where.rstrip('.') or 'it'} is {type(found).__name__}, not an object")
    for key in [*kinds, *found]:
        if key not in found:
            raise ValueError(f"it has no {where}{key}")
        if key not in kinds:
            raise ValueError(f"{where}{key} is not a key of it")
        value = found[key]
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise ValueError(f"{where}{key} is {type(value).__name__}")
