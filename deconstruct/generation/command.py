"""`deconstruct generate`: text from a run's checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from deconstruct.data.tokenizer import Tokenizer
from deconstruct.distributed.mesh import parse_mesh
from deconstruct.generation.generator import Generator, Request, Settings
from deconstruct.paths import is_remote, place, reaching, write_whole
from deconstruct.run import extensions
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the latest)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line; .jsonl: objects with `prompt` or `tokens`"
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="write objects there instead of text to the terminal")
    defaults = Settings()
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, metavar="T", help="0: greedy (default)"
    )
    parser.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    parser.add_argument("--min-p", type=float, default=defaults.min_p, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, metavar="R")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the first sample; the next ones count on")
    parser.add_argument("--samples", type=int, default=defaults.samples, metavar="N", help="texts for each prompt")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, metavar="B")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="split the model over all devices here: fsdp=4,tensor=2 (default: one)",
    )
    extensions.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names} | {"stop": tuple(arguments.stop)})
    settings.check()
    if arguments.output:
        _check_folder(arguments.output)
    mesh = parse_mesh(arguments.mesh) if arguments.mesh else None
    run_dir = Workdir(arguments.workdir)
    step = run_dir.step(arguments.step)
    text = run_dir.load_tokenizer(step)
    requests = list(_requests(arguments, settings, text))
    trust = extensions.trust(arguments)
    # Unrolled: a layer's cache is then an array of its own, updated in run_dir.
    model = restore_model(
        run_dir.folder, step, scan=False, mesh=mesh, extension=trust.files, allow_extensions=trust.all_found
    )
    generator = Generator(model, text, settings)
    alone = len(requests) == 1 and not arguments.output
    if alone:
        print(requests[0].prompt, end="", flush=True)
    generator.generate(requests, (lambda _, piece: print(piece, end="", flush=True)) if alone else None)
    if alone:
        print()
    elif arguments.output:
        _write(arguments.output, requests, step)
    else:
        for request in requests:
            print(f"--- sample {request.sample}, {request.stop}\n{request.prompt}{request.text}", flush=True)
    return 0


def _requests(arguments: argparse.Namespace, settings: Settings, text: Tokenizer) -> Iterator[Request]:
    for prompt, tokens in _prompts(arguments, text):
        for sample in range(settings.samples):
            yield Request(prompt, tokens, settings.seed + sample, sample)


def _prompts(arguments: argparse.Namespace, text: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    if arguments.prompt is not None:
        if not arguments.prompt:
            raise UserError("--prompt: the prompt is empty; give at least one character")
        yield arguments.prompt, text.encode(_whole(arguments.prompt, "--prompt"))
        return
    path = place(arguments.prompts)
    lines = _lines(path)
    if not lines:
        raise UserError(f"--prompts={path}: no prompt in it")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if path.suffix == ".jsonl":
            yield _entry(line, where, text)
        elif line:
            yield line, text.encode(line)
        else:
            raise UserError(f"{where}: the prompt is empty; give text")


def _lines(path: epath.Path) -> list[str]:
    if not path.exists():
        raise UserError(f"--prompts={path}: there is no such file")
    with reaching(path):
        data = path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")  # JSON may hold other ends of lines unescaped
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"--prompts={path}: line {line} is not UTF-8 (byte {error.start}); write it as UTF-8") from None
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _entry(line: str, where: str, text: Tokenizer) -> tuple[str, list[int]]:
    """The prompt in a line of JSON, and its ids."""
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(entry, dict) or not ({"prompt", "tokens"} & entry.keys()):
        raise UserError(f"{where}: expected an object with text in `prompt`, or ids in `tokens`")
    if "tokens" in entry:
        tokens = entry["tokens"]
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise UserError(f"{where}: `tokens` should be a list of ids, such as [5, 17], with at least one")
        return text.decode([token for token in tokens if 0 <= token < text.vocab_size]), tokens
    prompt = entry["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: `prompt` is {type(prompt).__name__}, not text")
    if not prompt:
        raise UserError(f"{where}: the prompt is empty; give text in `prompt`, or ids in `tokens`")
    return prompt, text.encode(_whole(prompt, where))


def _whole(prompt: str, where: str) -> str:
    """Raises UserError for half of a surrogate pair, which is what Python makes of bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the prompt is not UTF-8 at character {error.start}; write it as UTF-8") from None
    return prompt


def _check_folder(output: str) -> None:
    """Before there is anything to write."""
    folder = place(output).parent
    if not is_remote(folder) and not folder.is_dir():
        raise UserError(f"--output={output}: there is no folder {folder}; make it, or give another")


def _write(output: str, requests: Sequence[Request], step: int) -> None:
    path = place(output)
    records = [
        {
            "prompt": request.prompt,
            "sample": request.sample,
            "seed": request.seed,
            "text": request.text,
            "tokens": request.output,
            "stop": request.stop,
            "step": step,
        }
        for request in requests
    ]
    with reaching(path):
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    print(f"{len(records)} texts in {path}", file=sys.stderr)
