#!/usr/bin/env python3
"""Runs for every combination of settings, each in a workdir named by what sets it apart. The same command again runs
what has not finished.

    launch/sweep.py --config=configs/paper.py:size=70m --workdir=runs/sweep \\
        --over=variant=standard,mlp --over=config.learning_rate=4e-4,1e-3 --over=config.seed=0,1

    ... --jobs=2                                        two at a time, on this machine
    ... --slurm="--gpus-per-node=8 --time=24:00:00"     a SLURM job array of launch/slurm.sh, with sbatch's options
    ... --launcher="launch/skypilot.py --accelerators=H100:8 --"      a SkyPilot job each

`--over=KEY=...` is an argument of the config file, as in FILE.py:KEY=VALUE; `--over=config.KEY=...` is a key. Values
are separated by commas; a comma inside parentheses separates nothing. `--config.KEY=VALUE` and what stands behind --
go to every `deconstruct train`. A run has finished when its last checkpoint is that of its last step: no other books
are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

try:
    from deconstruct.experiment import load_config
    from deconstruct.run import checkpoint
    from deconstruct.run.workdir import Workdir
    from deconstruct.spelling import split_list
    from deconstruct.types import UserError
except ModuleNotFoundError as error:
    if error.name != "deconstruct":
        raise
    print(f"sweep.py: {sys.executable} has no deconstruct; activate the environment that has it", file=sys.stderr)
    sys.exit(2)

MISTAKE, STOPPED = 2, 75
SLURM_SCRIPT = Path(__file__).with_name("slurm.sh")


class Run(NamedTuple):
    """One combination: its name, and the arguments of `deconstruct train`."""

    name: str
    workdir: str
    train: tuple[str, ...]
    finished: bool


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the runs' workdirs")
    parser.add_argument("--over", action="append", required=True, metavar="KEY=V1,V2", help="repeatable")
    parser.add_argument("--jobs", type=int, metavar="N", help="how many at a time (default: 1; under SLURM: all)")
    parser.add_argument("--slurm", metavar="OPTIONS", help="submit a job array, with these options of sbatch")
    parser.add_argument(
        "--launcher",
        default="deconstruct train",
        metavar="COMMAND",
        help="what starts a run; its arguments are put behind it (default: deconstruct train)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    cut = words.index("--") if "--" in words else len(words)
    overrides = [word for word in words[:cut] if word.startswith("--config.")]
    arguments = parser.parse_args([word for word in words[:cut] if word not in overrides])
    try:
        if arguments.jobs is not None and arguments.jobs < 1:
            raise UserError(f"--jobs={arguments.jobs}: must be at least 1")
        runs = expand(arguments.config, arguments.workdir, arguments.over, [*overrides, *words[cut + 1 :]])
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return MISTAKE
    open_runs = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them finished", flush=True)
    if not open_runs:
        return 0
    if arguments.slurm is not None:
        return submit(arguments, runs)
    commands = {run: [*shlex.split(arguments.launcher), *run.train] for run in open_runs}
    if arguments.dry_run:
        for command in commands.values():
            print(shlex.join(command))
        return 0
    return run_here(commands, arguments.jobs or 1)


def expand(config: str, folder: str, over: list[str], common: list[str]) -> list[Run]:
    """Every combination, with each config read and checked; `common` are arguments of all of them. Raises UserError
    before anything is started."""
    axes: dict[str, list[str]] = {}
    for entry in over:
        key, _, values = entry.partition("=")
        axis = split_list(values)
        if not key or not axis or key in axes or len(set(axis)) < len(axis):
            raise UserError(f"--over={entry}: expected KEY=VALUE,VALUE,..., each key and each value once")
        axes[key] = axis
    runs: list[Run] = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        arguments = [f"{key}={value}" for key, value in chosen.items() if not key.startswith("config.")]
        file, _, given = config.partition(":")
        spec = ":".join(filter(None, [file, ",".join(filter(None, [given, *arguments]))]))
        overrides = [f"--{key}={value}" for key, value in chosen.items() if key.startswith("config.")]
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
        name = re.sub(r"[^\w.,=+()-]", "-", name)
        if any(run.name == name for run in runs):
            raise UserError(f"--over: two runs would be named {name}; give other values")
        loaded = load_config(spec, arguments=[*(word for word in common if word.startswith("--config.")), *overrides])
        workdir = f"{folder.rstrip('/')}/{name}"
        last = checkpoint.latest_step(Workdir(workdir).checkpoints)
        train = (f"--config={spec}", f"--workdir={workdir}", *common, *overrides)
        runs.append(Run(name, workdir, train, last is not None and last >= loaded.steps))
    return runs


def submit(arguments: argparse.Namespace, runs: list[Run]) -> int:
    """One job array over the lines of a file; the numbers of those that have not finished. The file's name says what is
    in it, so that jobs which still wait for their turn do not find other lines there."""
    lines = "".join(shlex.join(run.train) + "\n" for run in runs)
    file = Path(arguments.workdir) / f"runs-{hashlib.sha256(lines.encode()).hexdigest()[:8]}.txt"
    numbers = ",".join(str(number) for number, run in enumerate(runs, 1) if not run.finished)
    at_once = f"%{arguments.jobs}" if arguments.jobs else ""
    command = ["sbatch", f"--array={numbers}{at_once}", "--output=%x-%A_%a.log", *shlex.split(arguments.slurm)]
    command += [str(SLURM_SCRIPT), f"--runs={file.absolute()}"]
    if arguments.dry_run:
        print(shlex.join(command), f"# {file} holds", lines, sep="\n", end="")
        return 0
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines)
    return subprocess.run(command).returncode


def run_here(commands: dict[Run, list[str]], jobs: int) -> int:
    """Runs them here, `jobs` at a time, each with a log beside its workdir. Returns 0, 1 where one failed, 75 where it
    was asked to stop: then those under way are asked too, and save."""
    waiting, failed, stopping = list(commands), False, False
    running: dict[Run, subprocess.Popen[bytes]] = {}

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for child in running.values():
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    while running or (waiting and not stopping):
        if waiting and len(running) < jobs and not stopping:
            run = waiting.pop(0)
            log = Path(f"{run.workdir}.log") if "://" not in run.workdir else Path(f"{run.name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            print(f"{run.name}: started, {log}", flush=True)
            with log.open("a") as out:  # in a session of its own: Ctrl-C reaches it once, through `stop`
                running[run] = subprocess.Popen(commands[run], stdout=out, stderr=out, start_new_session=True)
            continue
        for run, child in list(running.items()):
            status = child.poll()
            if status is not None:
                del running[run]
                print(f"{run.name}: {'done' if status == 0 else f'ended with status {status}'}", flush=True)
                failed = failed or status != 0
        time.sleep(0.1)
    return STOPPED if stopping else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
