#!/usr/bin/env python3
"""The paper's study, at a scale that can be run: prepares text, trains every configuration, evaluates, reports.

    launch/reproduce.py --size=cpu --output=runs/reproduction                    two CPU cores, overnight
    launch/reproduce.py --size=gpu --output=runs/reproduction --input=novels/    one GPU, an hour or two
    launch/reproduce.py --size=paper --output=runs/reproduction --input="hub:..." --tokenizer=pythia.json
    launch/reproduce.py --size=cpu --output=runs/reproduction --dry-run          what it would do, and how long it takes

Seven variants, uniform and even, and nine layouts of non_approximate, three seeds each. It says how long it will take
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
from pathlib import Path
from typing import NamedTuple

import sweep

from deconstruct.costs import accounting
from deconstruct.duration import clock
from deconstruct.experiment import load_config
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = "mlp,approximate,non_approximate,rnd_emb_qk,fixed_seq_qk,static_emb_qk"
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


SIZES = {
    # As many parameters as configs/small.py has, over eight layers: with four, a quarter of them is the last one.
    "cpu": Size(
        "small.py",
        ("--config.model.num_layers=8", "--config.model.hidden_size=96", "--config.model.intermediate_size=288"),
        512,
        1024,
        "16,64,256",
        3e10,
        60.0,
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
    data, folder = f"{output}/data", f"{output}/runs"
    tokenizer = f"--tokenizer={arguments.tokenizer}" if arguments.tokenizer else f"--vocab-size={size.vocabulary}"
    prepare = [f"--output={data}", tokenizer, f"--row-length={size.row_length}"]
    prepare += [f"--input={given}" for given in arguments.input]
    sweeps = _sweeps(size, folder, data, arguments.seeds)
    runs = [run for axes in sweeps for run in _runs(axes, folder)]
    print(estimate(size, runs), flush=True)
    if arguments.dry_run:
        commands = [["deconstruct", "prepare", *prepare], *(["launch/sweep.py", *words] for words in sweeps)]
        commands += [["deconstruct", *words] for run in runs[-1:] for words in _evaluations(run, size)]
        commands += [["deconstruct", "report", folder, f"--output={output}/report"]]
        print(*map(shlex.join, commands), sep="\n")
        return 0
    if (status := _deconstruct("prepare", *prepare)) != 0:
        return status
    for axes in sweeps:
        if (status := sweep.main([*axes, *rest])) != 0:
            return status
    open_runs = [run.name for axes in sweeps for run in _runs(axes, folder) if not run.finished]
    if open_runs:
        print(f"{len(open_runs)} runs have not finished; the same command again goes on")
        return 0
    for run in runs:
        for words in _evaluations(run, size):
            if (status := _deconstruct(*words)) != 0:
                return status
    return _deconstruct("report", folder, f"--output={output}/report")


def estimate(size: Size, runs: list[sweep.Run]) -> str:
    """In words: how many runs are left, and how long they will take, one after the other."""
    left = done = seconds = 0.0
    for run in runs:
        flops = _train_flops(run, size.vocabulary)
        if run.finished:
            logged = read_jsonl(Workdir(run.workdir).metrics)
            seconds += sum(record["seconds"].get("step", 0.0) for record in logged)
            done += flops
        else:
            left += flops
    count = sum(not run.finished for run in runs)
    rate = done / seconds if seconds else size.rate * ((os.cpu_count() or 1) if size.rate < 1e12 else 1)
    how = "as fast as the runs that have finished" if seconds else f"at {rate:.2g} FLOP/s, which is a guess"
    needed = left / rate + count * size.overhead
    return f"{len(runs)} runs, {count} to go: about {clock(needed)} one after the other ({left:.2g} FLOPs {how})"


def _sweeps(size: Size, folder: str, data: str, seeds: int) -> list[list[str]]:
    """The arguments of sweep.py: standard attention, every variant in two layouts, one variant in the others."""
    common = [f"--config={CONFIGS / size.config}", f"--workdir={folder}", f"--config.data={data}", *size.overrides]
    over = f"--over=config.seed={','.join(map(str, range(seeds)))}"
    axes = (("standard", "uniform"), (VARIANTS, "uniform,even"), ("non_approximate", LAYOUTS))
    return [[*common, f"--over=variant={variants}", f"--over=layout={layouts}", over] for variants, layouts in axes]


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
