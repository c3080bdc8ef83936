"""Files of one JSON object a line, which a crash may tear and a resumed run continues."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from deconstruct.paths import is_remote, write_whole


def read_jsonl(path: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none where there is no file. A last line torn by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def readable_jsonl(path: epath.Path, last_bytes: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, or of its last bytes, that can be read, and how many complete lines cannot.

    Never fails for what the file holds: who looks at a run from outside takes what is there.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start = 0 if last_bytes is None else max(0, end - last_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")
    lines = lines[1 if start else 0 : -1]  # the first may be cut, the last is not complete
    records, damaged = [], 0
    for line in filter(None, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def append_jsonl(path: epath.Path, record: dict[str, Any]) -> None:
    """Adds one line, whole, and has it on disk when it returns."""
    line = json.dumps(record) + "\n"
    if is_remote(path):  # nothing can be added to an object in a bucket: it is written anew
        path.write_text((path.read_text() if path.exists() else "") + line)
        return
    with path.open("a") as file:
        file.write(line)
        file.flush()


def truncate_jsonl(path: epath.Path, last_step: int) -> None:
    """Drops what was logged after `last_step` (and a torn last line), so that a resumed run continues the file."""
    if path.exists():
        _replace(path, [record for record in read_jsonl(path) if record["step"] <= last_step])


def drop_torn_line(path: epath.Path) -> None:
    """Drops a last line that a crash left unfinished, so that the next one does not run into it."""
    if path.exists() and not path.read_text().endswith("\n"):
        _replace(path, read_jsonl(path))


def _replace(path: epath.Path, records: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records).encode())
