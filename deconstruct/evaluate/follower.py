"""`deconstruct evaluate`: a process of its own that reads a workdir's finished checkpoints and writes eval.jsonl.

eval.jsonl is the ledger too: what it holds is not measured again, however often the command is run.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from deconstruct.config import Config, MeshConfig
from deconstruct.data import tokenizer
from deconstruct.data.manifest import Manifest, load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.distributed.mesh import make_mesh
from deconstruct.evaluate.perplexity import Perplexity
from deconstruct.model.language_model import LanguageModel
from deconstruct.run import checkpoint
from deconstruct.run.checkpoint import CheckpointGoneError
from deconstruct.run.jsonl import append_jsonl, drop_torn_line, read_jsonl
from deconstruct.run.restore import restore_model, skipped
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

QUALIFIERS = (
    "context",
    "text",
    "skip",
    "windows",
    "stride",
    "max_tokens",
)  # with step and task: what makes a record its own

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--follow", action="store_true", help="evaluate every checkpoint as it appears, until the run's last step"
    )
    parser.add_argument(
        "--contexts", metavar="128,256,...", help="context lengths in tokens (default: the run's sequence length)"
    )
    parser.add_argument("--text", metavar="FILE", help="a text file instead of the validation rows")
    parser.add_argument("--windows", choices=("non-overlapping", "sliding"), default="non-overlapping")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="of sliding windows, in tokens (default: half the context)"
    )
    parser.add_argument(
        "--skip",
        nargs="?",
        const="block",
        default="",
        choices=("block", "mixer"),
        help="leave out the layers that are not standard, or only their mixers",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=0, metavar="N", help="use only the first N tokens (default: all)"
    )
    parser.add_argument("--data", metavar="DIR", help="where the prepared data is now, if not where the run had it")
    parser.add_argument(
        "--poll", type=float, default=5.0, metavar="SECONDS", help="how often --follow looks (default 5)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.follow and arguments.step is not None:
        raise UserError("--follow evaluates every step; leave --step out")
    if arguments.max_tokens < 0:
        raise UserError(f"--max-tokens={arguments.max_tokens}: must not be negative; 0 takes all")
    if not arguments.poll > 0:
        raise UserError(f"--poll={arguments.poll}: must be positive")
    run_dir = Workdir(arguments.workdir)
    while arguments.follow and not run_dir.config_file.exists():
        time.sleep(arguments.poll)  # the trainer has not begun yet
    evaluator = Evaluator(run_dir, run_dir.read_config(), arguments)
    if not arguments.follow:
        evaluator.evaluate(run_dir.step(arguments.step))
        return 0
    for step in evaluator.new_steps(arguments.poll):
        try:
            evaluator.evaluate(step)
        except CheckpointGoneError as gone:
            log.info("step %d was deleted before it could be evaluated: %s", step, gone)
    return 0


class Evaluator:
    """What one call of `evaluate` measures on each checkpoint: a text, at several contexts, one way of cutting
    windows."""

    def __init__(self, run_dir: Workdir, config: Config, arguments: argparse.Namespace):
        self.run_dir, self.config, self.skip = run_dir, config, arguments.skip
        self.contexts = parse_contexts(arguments.contexts) or [config.sequence_length]
        self.strides = [_stride(context, arguments.windows, arguments.stride) for context in self.contexts]
        skipped(config.model, self.skip)  # refuses what cannot be skipped before anything is loaded
        stream, text = self._read_text(arguments)
        self.max_tokens = arguments.max_tokens
        self.stream = stream[: self.max_tokens + 1] if self.max_tokens else stream
        self.constant = {"task": "perplexity", "text": text, "skip": self.skip, "windows": arguments.windows}
        self.mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
        self.perplexity = Perplexity(self.mesh)

    def _read_text(self, arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
        """The token stream, and what the ledger calls it."""
        if arguments.text:
            path = epath.Path(arguments.text)
            if not path.exists():
                raise UserError(f"--text={path}: there is no such file")
            content = path.read_bytes()
            try:
                tokens = tokenizer.load(self.run_dir.tokenizer).encode(content.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"--text={path}: not UTF-8 at byte {error.start}") from error
            return np.array(tokens, np.int32), f"{path.name}:{hashlib.sha256(content).hexdigest()[:12]}"
        data = arguments.data or self.config.data
        if not data:
            raise UserError(f"--workdir={self.run_dir.folder}: an imported model names no data; give --data or --text")
        manifest = load_manifest(data)
        self._check_data(data, manifest)
        whole = Windows(data, "validation", manifest.row_length)
        rows = whole.read(range(len(whole)))
        return np.append(rows[:, :-1].reshape(-1), rows[-1, -1]), "validation"

    def _check_data(self, data: str, manifest: Manifest) -> None:
        latest = checkpoint.latest_step(self.run_dir.checkpoints)
        if latest is None:
            return  # nothing saved yet: --follow meets the first checkpoint with the trainer's own data
        try:
            meta = checkpoint.read_meta(self.run_dir.checkpoints, latest)
        except CheckpointGoneError:  # a later one has taken its place
            return self._check_data(data, manifest)
        if meta["data"] is None:  # imported and not trained here yet: any data of its own tokenizer
            own, theirs = meta["tokenizer"], manifest.tokenizer
            if own not in (theirs["sha256"], None) or theirs["vocab_size"] > self.config.model.vocab_size:
                raise UserError(f"--data={data}: its tokenizer, {theirs['sha256'][:12]}, is not the imported model's")
        elif meta["data"]["fingerprint"] != manifest.fingerprint:
            raise UserError(
                f"--data={data}: its fingerprint is {manifest.fingerprint[:12]}, the run was trained on "
                f"{meta['data']['fingerprint'][:12]}"
            )

    def settings(self, step: int) -> Iterator[dict[str, Any]]:
        for context, stride in zip(self.contexts, self.strides, strict=True):
            yield {"step": step, **self.constant, "context": context, "stride": stride, "max_tokens": self.max_tokens}

    def evaluate(self, step: int) -> None:
        """Measures what the ledger does not hold yet of `step`, and adds it."""
        drop_torn_line(self.run_dir.evaluations)
        # Perplexity is written last: where it stands, the setting is complete.
        records = read_jsonl(self.run_dir.evaluations)
        done = {_identity(record) for record in records if record["metric"] == "perplexity"}
        missing = [setting for setting in self.settings(step) if _identity(setting) not in done]
        if not missing:
            log.info("step %d: everything asked for is in %s already", step, self.run_dir.evaluations)
            return
        model: LanguageModel = restore_model(self.run_dir.folder, step, skip=self.skip, mesh=self.mesh)
        for setting in missing:
            with jax.set_mesh(self.mesh):
                result = self.perplexity(model, self.stream, setting["context"], setting["stride"])
            for metric, value in (("nll", result.nll), ("perplexity", result.perplexity)):
                append_jsonl(
                    self.run_dir.evaluations,
                    {"step": step, "task": setting["task"], "metric": metric, "value": value, "tokens": result.tokens}
                    | {key: setting[key] for key in QUALIFIERS},
                )
            print(_line(step, setting, result.nll, result.perplexity, result.tokens), file=sys.stdout, flush=True)

    def new_steps(self, poll: float) -> Iterator[int]:
        """Each finished step once, oldest first, until the run's last."""
        seen: set[int] = set()
        while True:
            fresh = [step for step in checkpoint.finished_steps(self.run_dir.checkpoints) if step not in seen]
            for step in fresh:
                seen.add(step)
                yield step
                if step >= self.run_dir.read_config().steps:
                    return
            if not fresh:
                time.sleep(poll)


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("step", "task", *QUALIFIERS))


def parse_contexts(text: str | None) -> list[int]:
    try:
        contexts = [int(entry) for entry in text.split(",")] if text else []
    except ValueError:
        contexts = [0]
    if any(context < 1 for context in contexts):
        raise UserError(f"--contexts={text}: expected lengths in tokens, such as 128,256,512")
    return contexts


def _stride(context: int, kind: str, stride: int | None) -> int:
    if kind == "non-overlapping":
        if stride is not None:
            raise UserError(f"--stride={stride}: non-overlapping windows have none; add --windows=sliding")
        return context
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride={stride}: expected 1 to the context, {context}")
    return stride


def _line(step: int, setting: dict[str, Any], nll: float, perplexity: float, tokens: int) -> str:
    how = setting["windows"] if setting["windows"] != "sliding" else f"sliding by {setting['stride']}"
    skip = f", skip {setting['skip']}" if setting["skip"] else ""
    return (
        f"step {step}  context {setting['context']}  perplexity {perplexity:.4f}  nll {nll:.5f}  "
        f"({tokens:,} tokens of {setting['text']}, {how}{skip})"
    )
