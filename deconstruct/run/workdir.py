"""A workdir: the folder of one run.

config.json      the resolved configuration
checkpoints/     one folder per saved step
metrics.jsonl    one object per logged step; tensorboard/ holds the same
eval.jsonl       one object per evaluated step, task and setting
tokenizer/       the tokenizer of the training data
extensions/      files of the user's own that define layers, if there are any
"""

from __future__ import annotations

import json
import os

from deconstruct.config import Config
from deconstruct.data import tokenizer
from deconstruct.data.tokenizer import Tokenizer
from deconstruct.paths import place
from deconstruct.run import checkpoint
from deconstruct.types import UserError


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
        self.tokenizer = self.folder / "tokenizer"
        self.extensions = self.folder / "extensions"

    def write_config(self, config: Config) -> None:
        temporary = self.folder / "config.json.tmp"
        temporary.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        temporary.replace(self.config_file)

    def read_config(self) -> Config:
        if not self.config_file.exists():
            raise UserError(f"--workdir={self.folder}: no config.json there; `deconstruct train` makes a workdir")
        return Config.from_dict(json.loads(self.config_file.read_text()))

    def load_tokenizer(self, step: int) -> Tokenizer:
        """The tokenizer that the checkpoint of a step was trained with. Raises UserError where another lies there."""
        sha256 = checkpoint.read_meta(self.checkpoints, step)["tokenizer"]
        return tokenizer.load(self.tokenizer, sha256 or None, f"the checkpoint of step {step}")

    def step(self, step: int | None) -> int:
        """`step`, or the latest that is saved. Raises UserError where there is none."""
        if step is not None:
            return step
        latest = checkpoint.latest_step(self.checkpoints)
        if latest is None:
            raise UserError(f"--workdir={self.folder}: no finished checkpoint there yet")
        return latest
