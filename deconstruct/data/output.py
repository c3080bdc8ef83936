"""The folder that prepare fills: whose it is, what is under way in it, and what may be deleted there.

While prepare is under way `.partial/record.json` names each file that it may leave behind outside `.partial/`. What
neither that record nor a finished manifest accounts for is somebody else's: such a folder is refused, and only what
prepare has named itself is ever deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from deconstruct.data.manifest import FILE_NAME, PARTIAL, TOKENIZER_FOLDER
from deconstruct.lock import alone_in
from deconstruct.paths import is_remote, names_in, place, remove, write_whole
from deconstruct.types import UserError

RECORD = "record.json"
MADE_BY = "deconstruct prepare"
SCRATCH = "shards"
_OWN = re.compile(r"\.lock.*|" + re.escape(FILE_NAME) + r"(\.unfinished.*)?")
_OWN_PARTIAL = re.compile(r"\d{5,}\.(tokens|npy|json)(\.unfinished.*)?|tokenizer\.(model|json)(\.unfinished.*)?|"
                          r"(train|validation)-\d+-of-\d+\.array_record(\.unfinished.*)?")  # fmt: skip


class Output:
    """A folder of `--output`, here or in a bucket."""

    def __init__(self, folder: str):
        self._given = folder
        found = place(folder)
        self.folder = (
            found if is_remote(folder) else epath.Path(os.path.abspath(found))
        )  # other workers start elsewhere
        self._record = self.folder / PARTIAL / RECORD
        self._runs: list[str] = []
        self._files: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether a manifest is there: it is written last."""
        return (self.folder / FILE_NAME).exists()

    def check(self) -> None:
        """Raises UserError where something stands in the folder that prepare has not put there."""
        if not is_remote(self.folder) and self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output={self._given}: is a file; give a folder")
        if self.is_complete:
            return  # nothing will be written
        self._read_record()
        tops = {file.partition("/")[0] for file in self._files} | ({PARTIAL} if self._runs else set())
        others = sorted(n for n in names_in(self.folder) if n not in tops and not _OWN.fullmatch(n))
        if TOKENIZER_FOLDER in tops:
            inside = {f"{TOKENIZER_FOLDER}/{name}" for name in names_in(self.folder / TOKENIZER_FOLDER)}
            others += sorted(n for n in inside if n not in self._files and ".unfinished" not in n)
        if others:
            raise UserError(
                f"--output={self._given}: holds {others[0]}, which prepare has not put there; give a folder that is "
                "new or empty"
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the folder, which it makes, against another prepare."""
        try:
            if not is_remote(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output={self._given}: cannot be made: {error.strerror}; give another") from None
        with alone_in(self.folder, "--output", "prepare"):
            yield

    def begin(self, run: str) -> epath.Path:
        """The folder for what this run, or one before it with the same text and options, has done so far."""
        self._read_record()
        self._runs = list(dict.fromkeys([*self._runs, run]))
        partial = self.folder / PARTIAL / run
        if not is_remote(partial):
            partial.mkdir(parents=True, exist_ok=True)
        self._write_record()
        return partial

    def claim(self, files: Iterable[str]) -> None:
        """Says what is going to be written, before it is; deletes what a run that was killed has left of it."""
        present = names_in(self.folder)
        remove(self.folder / name for name in self._files if name in present)
        self._files = list(files)
        self._write_record()

    @contextlib.contextmanager
    def scratch(self, partial: epath.Path) -> Iterator[Path]:
        """A folder of this machine to write a shard in: the libraries write there alone."""
        if is_remote(partial):
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
            return
        folder = Path(partial) / SCRATCH
        folder.mkdir(exist_ok=True)
        yield folder

    def publish(self, file: Path, name: str) -> None:
        """Moves a finished file into the folder."""
        if not is_remote(self.folder):
            os.replace(file, self.folder / name)
            return
        with file.open("rb") as own, (self.folder / name).open("wb") as target:
            shutil.copyfileobj(own, target, 1 << 24)
        file.unlink()

    def clean(self) -> None:
        """Deletes what the runs in the record have left in `.partial/`, and whatever of it is then empty."""
        self._read_record()
        if not self._runs:
            return
        for run in self._runs:
            folder = self.folder / PARTIAL / run
            for inner in (folder / SCRATCH, folder / TOKENIZER_FOLDER, folder):
                remove(inner / name for name in sorted(names_in(inner)) if _OWN_PARTIAL.fullmatch(name))
                _remove_if_empty(inner)
        remove([self._record])
        _remove_if_empty(self._record.parent)

    def _read_record(self) -> None:
        if not self._record.exists():
            return
        try:
            found = json.loads(self._record.read_bytes())
            if found["made_by"] != MADE_BY:
                raise ValueError(found["made_by"])
            self._runs = [str(name) for name in found["runs"] if re.fullmatch("[0-9a-f]{16}", name)]
            self._files = [str(name) for name in found["files"] if ".." not in name and not name.startswith("/")]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._record}: not a record of prepare; give another --output") from None

    def _write_record(self) -> None:
        record = {"made_by": MADE_BY, "runs": self._runs, "files": self._files}
        write_whole(self._record, (json.dumps(record, indent=1) + "\n").encode())


def _remove_if_empty(folder: epath.Path) -> None:
    if not is_remote(folder) and folder.is_dir() and not names_in(folder):
        os.rmdir(folder)
