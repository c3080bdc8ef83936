"""What a prepared folder holds: `manifest.json`, written last, names every shard of packed rows.

Row r of a split holds tokens [r * R, r * R + R] of its stream: R + 1 tokens, of which the last is also the first of
the next row, so that a model is asked for each token once.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deconstruct.types import UserError

FORMAT = 1
FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"


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
            object.__setattr__(self, "fingerprint", self._computed_fingerprint())

    def split(self, name: str) -> Split:
        """The split of this name; UserError for another name than train or validation."""
        if name not in ("train", "validation"):
            raise UserError(f"split={name!r}: should be 'train' or 'validation'")
        return self.train if name == "train" else self.validation

    @property
    def row_bytes(self) -> int:
        return (self.row_length + 1) * np.dtype(self.dtype).itemsize

    def _computed_fingerprint(self) -> str:
        hashes = [shard.sha256 for split in (self.train, self.validation) for shard in split.shards]
        parts = [*hashes, self.tokenizer["sha256"], str(self.row_length)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def save_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes manifest.json in one move: it is there whole, or not at all."""
    path = Path(folder) / FILE_NAME
    unfinished = path.with_suffix(".json.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError where prepare has not run, or not to its end."""
    path = Path(folder).expanduser() / FILE_NAME
    again = f"run: deconstruct prepare --output={folder}"
    if not path.is_file():
        begun = (path.parent / ".partial").is_dir()
        what = "prepare has not finished here" if begun else "no prepared data here (no manifest.json)"
        raise UserError(f"{folder}: {what}; {again}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']}, this version reads {FORMAT}; {again} with a new folder")
        for name in ("train", "validation"):
            raw[name] = Split(**{**raw[name], "shards": tuple(Shard(**shard) for shard in raw[name]["shards"])})
        return Manifest(**raw)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: not a manifest of prepare; delete the folder and {again}") from None


def check_shards(folder: str | Path, split: Split) -> list[Path]:
    """The shards' paths. Raises UserError naming the first that is missing or not of its size."""
    paths = []
    for shard in split.shards:
        path = Path(folder).expanduser() / shard.name
        again = f"delete {folder} and run: deconstruct prepare --output={folder}"
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; {again}")
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(f"{path}: damaged, {size} bytes where the manifest says {shard.bytes}; {again}")
        paths.append(path)
    return paths
