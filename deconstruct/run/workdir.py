"""A workdir: the folder of one run.

config.json      the resolved configuration
checkpoints/     one folder per saved step
metrics.jsonl    one object per logged step; tensorboard/ holds the same
eval.jsonl       one object per evaluated step, task and setting
eval_items/      what each item of a task gave
sessions.jsonl   when the run was started, saved and ended
skipped.jsonl    updates that were not made, and what their batches were
tokenizer/       the tokenizer of the training data
extensions/      files of the user's own that define layers, if there are any
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from deconstruct.config import Config
from deconstruct.paths import place, write_whole
from deconstruct.types import UserError

if TYPE_CHECKING:
    from deconstruct.data.tokenizer import Tokenizer


class Workdir:
    """The names inside a workdir."""

    def __init__(self, folder: os.PathLike[str] | str):
        if os.fspath(folder).startswith("s3://"):
            raise UserError(
                f"--workdir={folder}: Orbax keeps checkpoints in files or in gs://, not in s3://; mount the bucket, or "
                "copy the folder to and from it"
            )
        self.folder = place(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.config_file = self.folder / "config.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.evaluations = self.folder / "eval.jsonl"
        self.sessions = self.folder / "sessions.jsonl"
        self.skipped = self.folder / "skipped.jsonl"
        self.tokenizer = self.folder / "tokenizer"
        self.extensions = self.folder / "extensions"

    def make(self) -> None:
        """Makes the folder, where it is not there. Raises UserError where it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"--workdir={self.folder}: is a file; give a folder") from None
        except OSError as error:
            raise UserError(f"--workdir={self.folder}: cannot be made: {error.strerror}; give another") from None

    def write_config(self, config: Config) -> None:
        write_whole(self.config_file, (json.dumps(config.to_dict(), indent=1) + "\n").encode())

    def read_config(self) -> Config:
        config = Config.from_dict(self.config_values())
        if not config.model.layers:
            raise UserError(f"{self.config_file}: says of no layer what it is; `deconstruct train` writes that")
        return config

    def config_values(self) -> dict[str, Any]:
        """What config.json holds, unchecked. Raises UserError where there is none, or none that can be read."""
        if not self.config_file.exists():
            raise UserError(f"{self.folder}: no config.json there; `deconstruct train` makes a workdir")
        try:
            values = json.loads(self.config_file.read_text())
        except ValueError as error:
            raise UserError(f"{self.config_file}: is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise UserError(f"{self.config_file}: holds no configuration, but {json.dumps(values)[:40]}")
        return values

    def load_tokenizer(self, step: int) -> Tokenizer:
        """The tokenizer that the checkpoint of a step was trained with. Raises UserError where another lies there."""
        from deconstruct.data import tokenizer
        from deconstruct.run import checkpoint

        sha256 = checkpoint.read_meta(self.checkpoints, step)["tokenizer"]
        return tokenizer.load(self.tokenizer, sha256 or None, f"the checkpoint of step {step}")

    def step(self, step: int | None) -> int:
        """`step`, or the latest that is saved. Raises UserError where there is none."""
        from deconstruct.run import checkpoint  # Orbax and JAX, which reading a run's folder does not need

        if step is not None:
            return step
        latest = checkpoint.latest_step(self.checkpoints)
        if latest is None:
            raise UserError(f"{self.folder}: no finished checkpoint there yet")
        return latest


def find_workdirs(folders: Iterable[str]) -> list[Workdir]:
    """The workdirs that some folders are, or hold, each once. Raises UserError for a folder without any."""
    found: dict[Any, None] = {}
    for folder in folders:
        path = place(folder)
        if not path.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        inside = [p for p in (path, *sorted(path.iterdir())) if Workdir(p).config_file.exists()]
        if not inside:
            raise UserError(f"{folder}: no workdir, and none in it; `deconstruct train` makes one")
        found |= dict.fromkeys([path] if inside[0] == path else inside)
    return [Workdir(path) for path in found]


def named(workdirs: list[Workdir]) -> list[tuple[str, Workdir]]:
    """Each with the name of its folder, or the whole path where two have the same."""
    names = [workdir.folder.name or str(workdir.folder) for workdir in workdirs]
    paths = [str(workdir.folder) for workdir in workdirs]
    return [
        (name if names.count(name) == 1 else path, workdir)
        for name, path, workdir in zip(names, paths, workdirs, strict=True)
    ]
