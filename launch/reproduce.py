#!/usr/bin/env python3
"""The paper's study, at a scale that can be run: prepares text, trains every configuration, evaluates, reports.

    launch/reproduce.py --size=cpu --output=runs/reproduction -- --jobs=2        two CPU cores, an evening
    launch/reproduce.py --size=gpu --output=runs/reproduction --input=novels/    one GPU, an hour or two
    launch/reproduce.py --size=paper --output=runs/reproduction --input="hub:..." --tokenizer=pythia.json
    launch/reproduce.py --size=cpu --output=runs/reproduction --dry-run          what it would do, and how long it takes

Text: seven variants, uniform and even, and nine layouts of non_approximate, three seeds each. Recall, as in
configs/recall.py: the seven, uniform and even, and three forms whose state does not grow. It says how long it will take
before it begins. The same command again goes on where it was: what is prepared, trained or evaluated is not done again.
What stands behind -- goes to sweep.py, such as --jobs=2, --slurm=... or --launcher=...; with --slurm, call it once more
when the jobs are done.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sweep

from deconstruct.costs import accounting
from deconstruct.data.recall import PREFIX, parse_recall
from deconstruct.duration import clock
from deconstruct.experiment import load_config
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = "mlp,approximate,non_approximate,rnd_emb_qk,fixed_seq_qk,static_emb_qk"
STATES = "hidden/window(size=8),hidden/gated_linear,hidden/gated_delta"
TASKS = ("perplexity", "indicators")
LAYOUTS = "odd,top,middle,bottom,quarter,first,last,bilateral"  # and even, which every variant has


class Size(NamedTuple):
    """`vocabulary`: of the tokenizer that is trained. `rate`: FLOP/s of training that are taken for granted before a
    run has shown its own; of the CPU, a core's. `overhead`: seconds a run takes besides: compiling, saving, evaluating.
    """

    config: str
    overrides: tuple[str, ...]
    vocabulary: int
    row_length: int
    contexts: str
    rate: float
    overhead: float


class Part(NamedTuple):
    """One of the study's two: `prepare` what it is trained on, the `sweeps` of it, how a run is evaluated."""

    prepare: list[str]
    sweeps: list[list[str]]
    folder: str
    vocabulary: int
    evaluations: Callable[[sweep.Run], list[list[str]]]

    @property
    def runs(self) -> list[sweep.Run]:
        return [run for axes in self.sweeps for run in _runs(axes, self.folder)]


SIZES = {
    # Eight layers: of four, a quarter is the last one.
    "cpu": Size(
        "small.py",
        (
            *("--config.model.num_layers=8", "--config.model.num_heads=2", "--config.model.hidden_size=64"),
            *("--config.model.intermediate_size=192", "--config.sequence_length=128", "--config.batch_size=16"),
            *("--config.steps=600", "--config.optimizer.warmup_steps=60", "--config.checkpoint_every=300"),
        ),
        512,
        1024,
        "16,64,128",
        2e10,
        40.0,
    ),
    "gpu": Size(
        "paper.py:size=70m",
        (
            *("--config.steps=300", "--config.batch_size=64", "--config.sequence_length=512"),
            *("--config.learning_rate=1e-3", "--config.optimizer.warmup_steps=30", "--config.optimizer.beta2=0.99"),
            *("--config.checkpoint_every=300", "--config.mesh.data=-1", "--config.mesh.fsdp=1"),
        ),
        8192,
        2048,
        "64,128,256,512",
        1e14,
        45.0,
    ),
    "paper": Size("paper.py:size=500m", (), 50_277, 2048, "128,256,512,1024,2048", 3e14, 600.0),
}
RECALL = parse_recall("recall:mqar(pairs=4,queries=11,keys=16,values=16,fillers=1,length=31)")


def main(words: list[str]) -> int:
    cut = words.index("--") if "--" in words else len(words)
    arguments, rest = _parser().parse_args(words[:cut]), words[cut + 1 :]
    try:
        return reproduce(arguments, rest)
    except UserError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return sweep.MISTAKE


def reproduce(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.seeds < 1:
        raise UserError(f"--seeds={arguments.seeds}: must be at least 1")
    size, output = SIZES[arguments.size], arguments.output.rstrip("/")
    parts = [_text(arguments, size, output), _recall(arguments, output)]
    print(estimate(size, parts), flush=True)
    report = ["report", *(part.folder for part in parts), f"--output={output}/report"]
    if arguments.dry_run:
        commands = []
        for part in parts:
            commands += [["deconstruct", *part.prepare], *(["launch/sweep.py", *words] for words in part.sweeps)]
            commands += [["deconstruct", *words] for words in part.evaluations(part.runs[-1])]
        print(*map(shlex.join, [*commands, ["deconstruct", *report]]), sep="\n")
        return 0
    for part in parts:
        if (status := _deconstruct(*part.prepare)) != 0:
            return status
        for axes in part.sweeps:
            if (status := sweep.main([*axes, *rest])) != 0:
                return status
    runs = [(part, run) for part in parts for run in part.runs]
    if open_runs := [run.name for _, run in runs if not run.finished]:
        print(f"{len(open_runs)} runs have not finished; the same command again goes on")
        return 0
    for part, run in runs:
        for words in part.evaluations(run):
            if (status := _deconstruct(*words)) != 0:
                return status
    return _deconstruct(*report)


def estimate(size: Size, parts: list[Part]) -> str:
    """In words: how many runs are left, and how long they will take, one after the other."""
    left = done = seconds = 0.0
    runs = [(part.vocabulary, run) for part in parts for run in part.runs]
    for vocabulary, run in runs:
        flops = _train_flops(run, vocabulary)
        if run.finished:
            logged = read_jsonl(Workdir(run.workdir).metrics)
            seconds += sum(record["seconds"].get("step", 0.0) for record in logged)
            done += flops
        else:
            left += flops
    count = sum(not run.finished for _, run in runs)
    rate = done / seconds if seconds else size.rate * ((os.cpu_count() or 1) if size.rate < 1e12 else 1)
    how = "as fast as the runs that have finished" if seconds else f"at {rate:.2g} FLOP/s, which is a guess"
    needed = left / rate + count * size.overhead
    return f"{len(runs)} runs, {count} to go: about {clock(needed)} one after the other ({left:.2g} FLOPs {how})"


def _text(arguments: argparse.Namespace, size: Size, output: str) -> Part:
    """Standard attention, every variant in two layouts, one variant in the others."""
    folder, data = f"{output}/runs", f"{output}/data"
    tokenizer = f"--tokenizer={arguments.tokenizer}" if arguments.tokenizer else f"--vocab-size={size.vocabulary}"
    prepare = ["prepare", f"--output={data}", tokenizer, f"--row-length={size.row_length}"]
    prepare += [f"--input={given}" for given in arguments.input]
    common = [f"--config={CONFIGS / size.config}", f"--workdir={folder}", f"--config.data={data}", *size.overrides]
    axes = (("standard", "uniform"), (VARIANTS, "uniform,even"), ("non_approximate", LAYOUTS))
    sweeps = [_sweep(common, *pair, arguments.seeds) for pair in axes]
    return Part(prepare, sweeps, folder, size.vocabulary, lambda run: _evaluations(run, size))


def _recall(arguments: argparse.Namespace, output: str) -> Part:
    folder, data = f"{output}/recall", f"{output}/recall-data"
    prepare = [
        "prepare",
        f"--output={data}",
        f"--input={PREFIX}{RECALL.spelled()}",
        f"--row-length={RECALL.length + 1}",
    ]
    common = [f"--config={CONFIGS / 'recall.py'}", f"--workdir={folder}", f"--config.data={data}"]
    axes = ((f"standard,{VARIANTS},{STATES}", "uniform"), (VARIANTS, "even"))
    sweeps = [_sweep(common, *pair, arguments.seeds) for pair in axes]
    return Part(prepare, sweeps, folder, len(RECALL.words()), _recall_evaluations)


def _sweep(common: list[str], variants: str, layouts: str, seeds: int) -> list[str]:
    """The arguments of sweep.py."""
    over = f"--over=config.seed={','.join(map(str, range(seeds)))}"
    return [*common, f"--over=variant={variants}", f"--over=layout={layouts}", over]


def _runs(words: list[str], folder: str) -> list[sweep.Run]:
    config = words[0].removeprefix("--config=")
    over = [word.removeprefix("--over=") for word in words if word.startswith("--over=")]
    return sweep.expand(config, folder, over, [word for word in words if word.startswith("--config.")])


def _train_flops(run: sweep.Run, vocabulary: int) -> float:
    words = [word for word in run.train if word.startswith("--config.") and not word.startswith("--config.data=")]
    words += ["--config.data=", f"--config.model.vocab_size={vocabulary}"]  # nothing may be prepared yet
    config = load_config(run.train[0].removeprefix("--config="), arguments=words)
    return config.steps * accounting.train_flops(config.model, config.batch_size, config.sequence_length).needed


def _evaluations(run: sweep.Run, size: Size) -> list[list[str]]:
    """Calls of `evaluate` that its ledger lacks: all tasks, perplexity at every context; of even hybrids perplexity
    also without the layers that are not standard."""
    contexts, ledger = size.contexts.split(","), read_jsonl(Workdir(run.workdir).evaluations)
    there = {(record["task"], str(record.get("context", "")), record.get("skip", "")) for record in ledger}
    wanted = {(task, context, "") for task in TASKS for context in (contexts if task == "perplexity" else [""])}
    words, calls = ["evaluate", f"--workdir={run.workdir}"], []
    if not wanted <= there:
        calls.append([*words, f"--tasks={','.join(TASKS)}", f"--contexts={size.contexts}"])
    if "layout=even" in run.name and ("perplexity", contexts[-1], "block") not in there:
        calls.append([*words, f"--contexts={contexts[-1]}", "--skip"])
    return calls


def _recall_evaluations(run: sweep.Run) -> list[list[str]]:
    measured = {record["task"] for record in read_jsonl(Workdir(run.workdir).evaluations)}
    return [] if "recall" in measured else [["evaluate", f"--workdir={run.workdir}", "--tasks=recall"]]


def _deconstruct(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "deconstruct", *words]).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", required=True, choices=tuple(SIZES), help="how large the models are")
    parser.add_argument("--output", required=True, metavar="DIR", help="data, runs and the report go there")
    parser.add_argument("--input", action="append", default=[], metavar="TEXT", help="as prepare takes it; repeatable")
    parser.add_argument("--tokenizer", metavar="FILE", help="one that exists, instead of one that is trained")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each configuration (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the estimate and the commands, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
