"""The text that models are measured on: the validation rows of a run, or a file. As one stream of tokens."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import numpy as np

from deconstruct.data import tokenizer
from deconstruct.data.manifest import Manifest, load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.data.tokenizer import Tokenizer
from deconstruct.evaluate.evaluation import Subject
from deconstruct.paths import place, reaching
from deconstruct.run import checkpoint
from deconstruct.run.checkpoint import CheckpointGoneError
from deconstruct.types import UserError

# Of every evaluation that reads a text.
OPTIONS: dict[str, dict[str, Any]] = {
    "--text": {"metavar": "FILE", "help": "a text file instead of the validation rows"},
    "--data": {"metavar": "DIR", "help": "where the prepared data is now, if not where the run had it"},
    "--max-tokens": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "use only the first N tokens (default: all)",
    },
}
# And of its records, with what goes without saying.
QUALIFIERS = {"text": "validation", "max_tokens": 0}


def check_options(options: argparse.Namespace) -> None:
    if options.max_tokens < 0:
        raise UserError(f"--max-tokens={options.max_tokens}: must not be negative; 0 takes all")


def read_text(subject: Subject, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The tokens int32 [N], one more than there are to predict, and what the ledger calls the text."""
    if options.text and options.data:
        raise UserError(f"--data={options.data}: --text={options.text} is read instead; leave one of them out")
    stream, name = _file(subject, options.text) if options.text else _validation(subject, options.data)
    vocabulary, greatest = subject.config.model.vocab_size, int(stream.max(initial=0))
    if greatest >= vocabulary:
        where = f"--text={options.text}" if options.text else f"--data={options.data or subject.config.data}"
        raise UserError(f"{where}: its tokens go up to {greatest}, and the model has the ids 0 to {vocabulary - 1}")
    return (stream[: options.max_tokens + 1] if options.max_tokens else stream), name


def _file(subject: Subject, file: str) -> tuple[np.ndarray, str]:
    path = place(file)
    if not path.exists():
        raise UserError(f"--text={path}: there is no such file")
    with reaching(path):
        content = path.read_bytes()
    try:
        tokens = tokenizer_of(subject).encode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--text={path}: not UTF-8 at byte {error.start}") from error
    return np.array(tokens, np.int32), f"{path.name}:{hashlib.sha256(content).hexdigest()[:12]}"


def tokenizer_of(subject: Subject) -> Tokenizer:
    """The one that the run is trained with, as its latest checkpoint says; before there is one, its data."""
    latest = checkpoint.latest_step(subject.run_dir.checkpoints)
    if latest is None:
        return tokenizer.of_prepared(subject.config.data, load_manifest(subject.config.data))
    try:
        return subject.run_dir.load_tokenizer(latest)
    except CheckpointGoneError:  # a later one has taken its place
        return tokenizer_of(subject)


def _validation(subject: Subject, data: str | None) -> tuple[np.ndarray, str]:
    data = data or subject.config.data
    if not data:
        folder = subject.run_dir.folder
        raise UserError(f"--workdir={folder}: an imported model names no data; give --data or --text")
    manifest = load_manifest(data)
    _check_data(subject, data, manifest)
    whole = Windows(data, "validation", manifest.row_length)
    rows = whole.read(range(len(whole)))
    return np.append(rows[:, :-1].reshape(-1), rows[-1, -1]), "validation"


def _check_data(subject: Subject, data: str, manifest: Manifest) -> None:
    latest = checkpoint.latest_step(subject.run_dir.checkpoints)
    if latest is None:
        return  # nothing saved yet: --follow meets the first checkpoint with the trainer's own data
    try:
        meta = checkpoint.read_meta(subject.run_dir.checkpoints, latest)
    except CheckpointGoneError:  # a later one has taken its place
        return _check_data(subject, data, manifest)
    if meta["data"] is None:  # imported and not trained here yet: any data of its own tokenizer
        own, theirs = meta["tokenizer"], manifest.tokenizer
        if own not in (theirs["sha256"], None) or theirs["vocab_size"] > subject.config.model.vocab_size:
            raise UserError(f"--data={data}: its tokenizer, {theirs['sha256'][:12]}, is not the imported model's")
    elif meta["data"]["fingerprint"] != manifest.fingerprint:
        raise UserError(
            f"--data={data}: its fingerprint is {manifest.fingerprint[:12]}, the run was trained on "
            f"{meta['data']['fingerprint'][:12]}"
        )
