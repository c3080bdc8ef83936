"""`deconstruct prepare`: text -> tokenizer, packed rows, manifest. Offline, once, on a CPU.

    deconstruct prepare --output=prepared                                   Python's own sources, no download
    deconstruct prepare --input=novels/ --output=prepared --vocab-size=8192
    deconstruct prepare --input="recall:mqar(pairs=8)" --output=prepared --row-length=64     to be recalled from

What comes out depends on the text and the options alone, not on the number of workers. Killed and run again, it goes
on from the units it has finished, which stay under OUTPUT/.partial until the manifest is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from deconstruct.data import recall
from deconstruct.data import tokenizer as tokenizers
from deconstruct.data.crew import PROCESSES, Crew, check_engine, open_crew
from deconstruct.data.encode import (
    Part,
    PartWriter,
    Summary,
    encode_unit,
    part_file,
    sample_unit,
    token_dtype,
)
from deconstruct.data.manifest import FORMAT, TOKENIZER_FOLDER, Manifest, check_shards, load_manifest, save_manifest
from deconstruct.data.output import Output
from deconstruct.data.pack import SPLITS, Packer, unigram_perplexity
from deconstruct.data.sample import Sample
from deconstruct.data.sources import Unit, capped, documents, identity, work_units
from deconstruct.paths import names_in, reaching
from deconstruct.types import UserError

SAMPLE_CHARACTERS = 10_000_000
EVERYTHING = 1 << 62


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PrepareOptions:
    """The options of the verb, under their names there; `add_arguments` says what each is."""

    output: str
    input: tuple[str, ...] = ()
    key: str = "text"
    vocab_size: int = 4096
    tokenizer: str | None = None
    row_length: int = 2048
    validation_fraction: float = 0.01
    max_characters: int | None = None
    seed: int = 0
    workers: int = 0
    max_bad_share: float = 0.001
    executor: str = PROCESSES

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        if self.tokenizer is None:
            tokenizers.check_vocab_size(self.vocab_size)
        _require(self.row_length >= 1, "row-length", self.row_length, "at least 1")
        _require(0 < self.validation_fraction < 1, "validation-fraction", self.validation_fraction, "between 0 and 1")
        _require(0 <= self.max_bad_share <= 1, "max-bad-share", self.max_bad_share, "from 0 to 1")
        _require(self.workers >= 0, "workers", self.workers, "at least 1 (or 0 for one a core)")
        _require(
            self.max_characters is None or self.max_characters >= 1, "max-characters", self.max_characters, "at least 1"
        )
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        check_engine(self.executor, self.workers)
        for path in self.input if self.executor != PROCESSES else ():
            is_whole = ":" in path or os.path.isabs(os.path.expanduser(path))
            _require(is_whole, "input", path, "absolute, as the workers of --executor start in folders of their own")

    def that_matter(self) -> dict[str, Any]:
        """The options that change what comes out."""
        kept = asdict(self)
        for name in ("output", "workers", "max_bad_share", "executor"):
            del kept[name]
        if self.tokenizer is not None:
            del kept["vocab_size"]
        return {**kept, "input": list(self.input)}


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Prepares a folder; returns its manifest as a dict (see `Manifest`).

    A folder already complete with the same options and input is left as it is. Raises UserError for a mistake in the
    options, an input that cannot be read, more bad lines than allowed, too little text for one row of a split, or a
    folder complete with other options.
    """
    options.check()
    output = Output(options.output)
    with reaching(options.output):
        output.check()
    given = _given_tokenizer(options)
    units = work_units(options.input, options.key)
    input_sha256 = identity(units)
    with reaching(options.output), output.alone():
        if output.is_complete:
            manifest = _completed(options, given, input_sha256)
        else:
            matter = [FORMAT, options.that_matter(), given.fingerprint if given else None, input_sha256]
            partial = output.begin(hashlib.sha256(json.dumps(matter).encode()).hexdigest()[:16])
            manifest = _prepare(options, given, units, input_sha256, output, partial)
            save_manifest(output.folder, manifest)
        output.clean()
    return asdict(manifest)


def _prepare(
    options: PrepareOptions, given: tokenizers.Tokenizer | None, units: list[Unit], input_sha256: str,
    output: Output, partial: epath.Path,
) -> Manifest:  # fmt: skip
    if options.max_characters is not None:
        units = capped(units, options.max_characters)
    with open_crew(options.executor, min(options.workers or _cores(), len(units)), os.fspath(partial)) as crew:
        tokenizer = _tokenizer(options, given, units, partial / TOKENIZER_FOLDER, crew)
        parts = _parts(options, units, tokenizer, partial, crew)
        bad_lines = _bad_lines(options, parts)
        is_one = sum(part.summary.documents for part in parts) == 1
        if is_one:
            parts = [_split(options, units, tokenizer, partial)]
        dtype = token_dtype(tokenizer.vocab_size)
        packer = Packer(parts, options.validation_fraction, options.row_length, tokenizer.vocab_size, dtype)
        tokenizer_file = f"{TOKENIZER_FOLDER}/{tokenizer.file_name}"
        output.claim([*packer.shard_names(), tokenizer_file])
        splits, counts = packer.write(crew, output, partial)
    tokenizer.save(output.folder / TOKENIZER_FOLDER)
    return Manifest(
        row_length=options.row_length,
        dtype=dtype,
        tokenizer={
            "kind": tokenizer.kind,
            "file": tokenizer_file,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        train=splits["train"],
        validation=splits["validation"],
        unigram_perplexity=unigram_perplexity(counts["train"], counts["validation"]),
        bad_lines=bad_lines,
        options=options.that_matter(),
        input_sha256=input_sha256,
        one_document=is_one,
    )


def _given_tokenizer(options: PrepareOptions) -> tokenizers.Tokenizer | None:
    """The one that is not to be trained: named, or that of the words that documents made for recall have."""
    made = [given for given in options.input if given.startswith(recall.PREFIX)]
    if not made:
        return tokenizers.load(options.tokenizer) if options.tokenizer else None
    if len(options.input) > 1 or options.tokenizer:
        raise UserError(f"--input={made[0]}: has words of its own; give it alone, and no --tokenizer")
    return tokenizers.JsonTokenizer(recall.tokenizer_json(recall.parse_recall(made[0])))


def _tokenizer(
    options: PrepareOptions, given: tokenizers.Tokenizer | None, units: list[Unit], folder: epath.Path, crew: Crew
) -> tokenizers.Tokenizer:
    if folder.is_dir() and any(folder.iterdir()):
        return tokenizers.load(folder)
    if given is not None:
        given.save(folder)
        return given
    sample, found = Sample(SAMPLE_CHARACTERS, options.seed), Summary()

    def take(result: tuple[Sample, Summary]) -> None:
        sample.merge(result[0])
        found.add(result[1])

    # Each job is told what is known to be of no use by then, so that little comes back of a large text.
    jobs = ((unit, SAMPLE_CHARACTERS, options.seed, sample.ceiling) for unit in units)
    crew.map(sample_unit, jobs, len(units), "sample", take)
    _check_documents(found)
    _say(f"training a tokenizer of {options.vocab_size} ids")
    return tokenizers.train_sentencepiece(
        sample.excerpts(), options.vocab_size, folder, SAMPLE_CHARACTERS, options.seed
    )


def _parts(
    options: PrepareOptions, units: list[Unit], tokenizer: tokenizers.Tokenizer, partial: epath.Path, crew: Crew
) -> list[Part]:
    """The parts, in the order of the units."""
    there = names_in(partial)
    left = [i for i in range(len(units)) if part_file(partial, i, "json").name not in there]
    if len(left) < len(units):
        _say(f"{len(units) - len(left)} of {len(units)} parts are there from an earlier run")
    folder = os.fspath(partial / TOKENIZER_FOLDER)
    jobs = ((units[i], i, os.fspath(partial), folder, options.seed) for i in left)
    crew.map(encode_unit, jobs, len(left), "encode")
    return [Part(partial, i, token_dtype(tokenizer.vocab_size)) for i in range(len(units))]


def _split(options: PrepareOptions, units: list[Unit], tokenizer: tokenizers.Tokenizer, partial: epath.Path) -> Part:
    """The one document there is, as two: its end is the validation split."""
    _say("the input is one document: its end is the validation split")
    text = next(item for unit in units for item in documents(unit) if isinstance(item, str))
    cut = max(1, int(len(text) * (1 - options.validation_fraction)))
    cut = text.find("\n", cut) + 1 or cut
    with PartWriter(partial, len(units), tokenizer) as writer:
        writer.add(text[:cut], 2**64 - 1)
        writer.add(text[cut:], 0)
    return Part(partial, len(units), token_dtype(tokenizer.vocab_size))


def _check_documents(found: Summary) -> None:
    if not found.documents:
        why = f"{found.bad} bad, the first {found.examples[0]}" if found.bad else "the text is empty"
        raise UserError(f"--input: no document in it ({why})")


def _bad_lines(options: PrepareOptions, parts: list[Part]) -> dict[str, Any]:
    found = Summary()
    for part in parts:
        found.add(part.summary)
    _check_documents(found)
    bad, every = found.bad, found.bad + found.documents
    for example in found.examples:
        _say(example)
    if bad:
        _say(f"{bad} of {every} lines are not documents and are left out")
    if bad > options.max_bad_share * every:
        raise UserError(
            f"--max-bad-share={options.max_bad_share}: {bad} of {every} lines ({bad / every:.2%}) are bad, the first "
            f"{found.examples[0]}; mend them or allow --max-bad-share={bad / every + 5e-5:.4f}"
        )
    return {"count": bad, "examples": found.examples}


def _completed(options: PrepareOptions, given: tokenizers.Tokenizer | None, input_sha256: str) -> Manifest:
    """The manifest that is there, if these options would write the same; else UserError."""
    manifest = load_manifest(options.output)
    now, then = options.that_matter(), manifest.options
    remedy = f"{options.output} is complete; give another --output"
    if input_sha256 != manifest.input_sha256:
        before = " ".join(then["input"]) or "Python's own sources"
        raise UserError(f"--input: not the text that was prepared there ({before}, or its files changed); {remedy}")
    if given is not None and given.fingerprint != manifest.tokenizer["sha256"]:
        raise UserError(f"--tokenizer={options.tokenizer}: not the tokenizer used there; {remedy}")
    if (then["tokenizer"] is None) != (options.tokenizer is None):
        raise UserError(f"--tokenizer={options.tokenizer}: was {then['tokenizer']} there; {remedy}")
    for name in now:
        if name not in ("input", "tokenizer") and now[name] != then[name]:
            raise UserError(f"--{name.replace('_', '-')}={now[name]}: was {then[name]} there; {remedy}")
    for split in (manifest.train, manifest.validation):
        check_shards(options.output, split, hashed=EVERYTHING)
    tokenizers.of_prepared(options.output, manifest)
    _say(f"{options.output} is complete already")
    return manifest


def _require(holds: bool, name: str, value: object, range_: str) -> None:
    if not holds:
        raise UserError(f"--{name}={value}: must be {range_}")


def _say(line: str) -> None:
    print(f"prepare: {line}", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    default = PrepareOptions(output="")
    parser.add_argument(
        "--input", action="append", default=[], metavar="PATH",
        help="a .txt (one document), .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder or glob of them, or "
        "hub:NAME[:CONFIG][:SPLIT], may be repeated; or recall:mqar or recall:induction, with (option=value, ...). "
        "Without it: the Python standard library's own sources",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the prepared data goes")
    parser.add_argument("--key", default=default.key, help="key or column of the text (default: %(default)s)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"ids of the tokenizer to train (default: {default.vocab_size})",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="use this .model or .json tokenizer instead of training one"
    )
    parser.add_argument(
        "--row-length", type=int, default=default.row_length, help="tokens of a stored row (default: %(default)s)"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=default.validation_fraction, metavar="SHARE",
        help="share of the tokens kept for validation, in whole documents and so at least that (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-characters", type=int, metavar="N", help="use only the first N characters of the input")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of the sample and the split (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--executor", default=default.executor, metavar="ENGINE",
        help=f"{PROCESSES} of this machine (default), or dask:ADDRESS of a scheduler, whose workers see --input and "
        "--output under the same paths",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-share", type=float, default=default.max_bad_share, metavar="SHARE",
        help="fail if more of the lines than this are not documents (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the verb and prints what came out. Returns the exit status."""
    if args.tokenizer and args.vocab_size is not None:
        raise UserError(f"--vocab-size={args.vocab_size}: --tokenizer={args.tokenizer} has its own; leave it out")
    args.vocab_size = PrepareOptions.vocab_size if args.vocab_size is None else args.vocab_size
    options = {name: getattr(args, name) for name in PrepareOptions.__dataclass_fields__}
    manifest = prepare(PrepareOptions(**{**options, "input": tuple(args.input)}))
    tokens = sum(manifest[name]["tokens"] for name in SPLITS)
    for name in SPLITS:
        split = manifest[name]
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens ({split['tokens'] / tokens:.2%}), "
            f"{split['rows']:,} rows"
        )
    print(f"tokenizer: {manifest['tokenizer']['kind']}, {manifest['tokenizer']['vocab_size']:,} ids")
    print(f"unigram perplexity: {manifest['unigram_perplexity']:.1f}")
    print(f"prepared: {options['output']} (fingerprint {manifest['fingerprint'][:12]})")
    return 0
