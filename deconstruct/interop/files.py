"""A Hugging Face checkpoint folder on disk: safetensors read and written tensor by tensor, and folders that appear
whole or not at all.

The safetensors format: 8 bytes, the length of a JSON header (little endian); the header, `{name: {dtype, shape,
data_offsets}}`, padded with spaces to 8 bytes; the arrays, row-major. Writing needs shapes and dtypes alone before
the first array is there, so neither direction holds more than one array at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deconstruct.types import UserError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl")
SHARD_BYTES = 5_000_000_000
# safetensors' names of dtypes; those that fit into float32 exactly, and the integers of a fixed text.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I32": "int32"}
CODES = {name: code for code, name in DTYPES.items()}


class Array(NamedTuple):
    """What a file says of an array before it is read."""

    shape: tuple[int, ...]
    dtype: str  # float32, bfloat16, ...; safetensors' own name where we cannot read it


class Tensors:
    """The safetensors of a folder, one file or shards with an index. Opening reads the headers alone.

    `arrays` holds shape and dtype by name. Raises UserError, naming the file, for a folder without safetensors, a
    damaged or truncated file, and an index that does not match its shards.
    """

    def __init__(self, folder: Path):
        self._open: dict[str, tuple[Path, Any]] = {}  # by the name of a tensor
        self.arrays: dict[str, Array] = {}
        for path, expected in _shards(folder).items():
            handle = _opened(path)
            names = set(handle.keys())
            for name in sorted(names) if expected is None else expected:
                if name not in names:
                    raise UserError(f"{path}: has no tensor {name}, which {INDEX} places there")
                header = handle.get_slice(name)
                dtype = header.get_dtype()
                self._open[name] = path, handle
                self.arrays[name] = Array(tuple(header.get_shape()), DTYPES.get(dtype, dtype))

    def read(self, name: str) -> np.ndarray:
        """The array as it is stored (bfloat16 by ml_dtypes)."""
        return self._open[name][1].get_tensor(name)

    def where(self, name: str) -> Path:
        return self._open[name][0]


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """The files, and the tensors that an index expects in each; None, whatever it holds, where there is one file."""
    if own_file(folder / ONE_FILE).is_file():
        return {folder / ONE_FILE: None}
    if not own_file(folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: a pickle runs whatever code it holds when it is read; only safetensors are "
                "imported (in transformers, save_pretrained writes them)"
            )
        raise UserError(f"--checkpoint={folder}: holds neither {ONE_FILE} nor {INDEX}")
    index = read_json(folder / INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX}: has no weight_map")
    shards: dict[Path, list[str] | None] = {}
    for shard in dict.fromkeys(names.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in this folder")
        if not own_file(folder / shard).is_file():
            raise UserError(f"{folder / shard}: no such file, and {INDEX} names it")
        shards[folder / shard] = [name for name, place in names.items() if place == shard]
    return shards


def _opened(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from None


def write_safetensors(
    folder: Path,
    described: dict[str, Array],
    arrays: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes `arrays`, which come in the order of `described`, as one file or as shards with an index.

    Each is cast to the dtype described. Returns the names of the files of tensors, which hold at most `shard_bytes` or
    one array.
    """
    shards = _split(described, shard_bytes)
    source = iter(arrays)
    names = [ONE_FILE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _ids(shards)]
    for file_name, shard in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: described[name] for name in shard}))
            for expected in shard:
                name, array = next(source)
                assert name == expected and array.shape == described[name].shape, (name, expected, array.shape)
                file.write(np.ascontiguousarray(array, jnp.dtype(described[name].dtype)).tobytes())
    if len(shards) > 1:
        total = sum(_bytes(array) for array in described.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return names


def _ids(shards: list[list[str]]) -> range:
    return range(1, len(shards) + 1)


def _bytes(array: Array) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _split(described: dict[str, Array], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in described.items():
        if shards[-1] and filled + _bytes(array) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(array)
    return shards


def _header(described: dict[str, Array]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know who lays matrices out
    end = 0
    for name, array in described.items():
        start, end = end, end + _bytes(array)
        entries[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def own_file(path: Path) -> Path:
    """The path of a file in a checkpoint folder. Raises UserError for a link that leads out of it: what it names is
    read, and may be copied. In a cache of the Hub files are links to the `blobs` beside `snapshots`."""
    if path.is_symlink():
        folder, target = path.parent.resolve(), path.resolve()
        blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
        if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
            raise UserError(f"{path}: a link to {target}, outside the checkpoint; copy that file here if it is meant")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def fresh_folder(option: str, given: str | os.PathLike[str]) -> Path:
    """The path of a folder that is about to be made. Raises UserError where it holds something already."""
    if "://" in os.fspath(given):
        raise UserError(f"{option}={given}: expected a folder of this machine; copy it from there")
    folder = Path(given).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{option}={folder}: exists and is not an empty folder; give another")
    return folder


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes `folder` at the end, and vanishes if anything is raised."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)  # an empty folder in its place is replaced
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
