"""Kills runs at random moments, again and again, and checks that nothing is lost and no number changes.

    python -m tests.train.kill_loop --kills=1000 --folder=/tmp/kills [--seed=0] [--patience=60]

A run is started, killed, started again, ..., until it ends by itself; then the next begins. Kills are SIGKILL, SIGTERM
and SIGINT of a process alone, and of two processes these or SIGSTOP of one, at any moment from the start of the
program on: while it imports, compiles, restores, trains, saves and deletes old checkpoints. After each, every
checkpoint that was finished before is finished still, but for those that retention takes; after the last, metrics and
arrays are those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import portpicker

from tests.tiny import CONFIG_FILE

ROOT = Path(__file__).parents[2]
STEPS, EVERY, KEEP = 24, 3, 2
PATIENCE = 60  # seconds within which a process whose peer is gone, or that was asked to, has to end


class Cluster:
    """One or two processes of a run."""

    def __init__(self, loop: Loop, workdir: Path, processes: int):
        self.started = time.monotonic()
        port = portpicker.pick_unused_port()
        self.processes = []
        self.log = workdir.with_suffix(".log")
        for i in range(processes):
            words = train_words(loop.config, loop.data, workdir, steps=loop.steps)
            if processes > 1:
                words += [f"--coordinator=localhost:{port}", f"--num-processes={processes}", f"--process-id={i}"]
                words += [f"--start-timeout={loop.patience // 2}"]
            environment = {**loop.environment, "JAX_NUM_CPU_DEVICES": str(2 // processes)}
            command = [sys.executable, "-m", "deconstruct", *words]
            with self.log.open("a") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        return all(process.poll() is not None for process in self.processes)

    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


class Loop:
    """`clusters`: the share of starts that are of two processes. `patience`: seconds, more on a machine that is busy
    with other things. `steps` of each run."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        seed: int,
        clusters: float = 0.15,
        patience: int = PATIENCE,
        steps: int = STEPS,
    ):
        self.folder, self.data, self.draw, self.clusters = folder, data, random.Random(seed), clusters
        self.patience, self.steps = patience, steps
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            # Compiling takes most of a short run; among tests, these are theirs.
            "XLA_FLAGS": os.environ.get("XLA_FLAGS") or "--xla_backend_optimization_level=0",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),  # or most of the time would go into compiling
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.config = folder / "config.py"
        self.config.write_text(CONFIG_FILE)
        self.kills: dict[str, int] = {}
        self.recoveries: list[float] = []
        self.runs = 0

    def undisturbed(self) -> Path:
        """The run that all others are compared with; also how long one takes, by which moments are drawn. It compiles,
        which the others need not."""
        cluster = Cluster(self, self.folder / "whole", 1)
        if not cluster.wait(5 * self.patience) or cluster.statuses() != [0]:
            raise AssertionError(cluster.log.read_text()[-3000:])
        self.seconds = time.monotonic() - cluster.started
        return self.folder / "whole"

    def run(self, kills: int) -> None:
        whole = self.undisturbed()
        while sum(self.kills.values()) < kills:
            workdir = self.folder / f"run-{self.runs}"
            self._until_it_ends(workdir, kills)
            compare(workdir, whole, self.steps)
            self.runs += 1
            print(self, flush=True)

    def _until_it_ends(self, workdir: Path, kills: int) -> None:
        finished: list[int] = []
        for _ in range(200):
            processes = 2 if self.draw.random() < self.clusters else 1
            last = sum(self.kills.values()) >= kills
            cluster = Cluster(self, workdir, 1 if last else processes)
            try:
                if last or cluster.wait(self.draw.uniform(0, 0.6 * self.seconds)):
                    if not cluster.wait(5 * self.patience) or set(cluster.statuses()) != {0}:
                        raise AssertionError(f"{cluster.statuses()}: {cluster.log.read_text()[-3000:]}")
                else:
                    self._kill(cluster, workdir)
            finally:
                cluster.end()
            self._recovered(cluster, workdir)
            finished = self._nothing_lost(workdir, finished)
            if set(cluster.statuses()) == {0}:
                return
        raise AssertionError(f"{workdir}: does not get to its end")

    def _kill(self, cluster: Cluster, workdir: Path) -> None:
        victim = self.draw.choice(cluster.processes)
        several = len(cluster.processes) > 1
        stops = [signal.SIGSTOP] if several else []
        kind = self.draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, *stops])
        name = f"{kind.name}{' of one of two' if several else ''}"
        self.kills[name] = self.kills.get(name, 0) + 1
        victim.send_signal(kind)
        others = [process for process in cluster.processes if process is not victim]
        if kind in (signal.SIGKILL, signal.SIGSTOP):
            deadline = time.monotonic() + self.patience
            for process in others:
                try:
                    status = process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"{name}: the other goes on after {self.patience} s: {cluster.log}") from None
                # It may have been at its end already.
                assert status != 0 or json_step(workdir) == self.steps, f"{name}: the other ended with 0"
            return
        if not cluster.wait(self.patience):
            raise AssertionError(f"{name}: not ended after {self.patience} s: {cluster.log}")
        # 75: saved; 0: was at its end; before the program could listen, the signal's own end.
        early = {130, -signal.SIGINT, -signal.SIGTERM, 1}
        assert set(cluster.statuses()) <= {0, 75, *early}, f"{name}: {cluster.statuses()} {cluster.log}"

    def _nothing_lost(self, workdir: Path, before: list[int]) -> list[int]:
        """The finished steps; those of before must be among them, but for what retention may take."""
        now = finished(workdir)
        newest = sorted({*before, *now})[-KEEP:]
        lost = [step for step in before if step in newest and step not in now]
        assert not lost, f"{workdir}: checkpoints {lost} were finished, and are gone; there are {now}"
        return now

    def _recovered(self, cluster: Cluster, workdir: Path) -> None:
        """How long after its start the run was at work again, if it came so far."""
        sessions = workdir / "sessions.jsonl"
        if sessions.exists():
            lines = [json.loads(line) for line in sessions.read_text().splitlines() if line.endswith("}")]
            begun = [line["time"] for line in lines if line["event"] == "begin"]
            wall = time.time() - (time.monotonic() - cluster.started)
            if begun and begun[-1] > wall:
                self.recoveries.append(begun[-1] - wall)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        times = sorted(self.recoveries) or [0.0]
        return (
            f"{sum(self.kills.values())} kills ({kinds}) of {self.runs} runs, each then equal to the undisturbed one; "
            f"at work again after {statistics.median(times):.1f} s (median), {times[-1]:.1f} s (worst)"
        )


def train_words(config: Path, data: Path, workdir: Path, **changes: int) -> list[str]:
    """What `deconstruct` is told; `changes` are keys of the configuration."""
    settings = {"data": data, "layout": "uniform", "steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-2}
    settings |= {"checkpoint.keep": KEEP, **changes}
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["train", f"--config={config}:variant=non_approximate", f"--workdir={workdir}", *keys]


def finished(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return sorted(step for step in steps if (folder / str(step) / "meta" / "data.json").exists())


def json_step(workdir: Path) -> int:
    return max(finished(workdir), default=0)


def compare(workdir: Path, whole: Path, last: int = STEPS) -> None:
    """Metrics (but for the time things took) and the arrays of the last checkpoint."""
    got, want = (
        [
            {key: value for key, value in json.loads(line).items() if key not in ("tokens_per_second", "seconds")}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (workdir, whole)
    )
    assert got == want, f"{workdir}: the metrics are not those of {whole}"
    sums = [
        json.loads((place / "checkpoints" / str(last) / "meta" / "data.json").read_text())["checksums"]
        for place in (workdir, whole)
    ]
    assert sums[0] == sums[1], f"{workdir}: the last arrays are not those of {whole}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=int, default=PATIENCE)
    arguments = parser.parse_args()
    from tests.evaluate.conftest import prepare_text

    data = arguments.folder / "prepared"
    if not data.exists():
        prepare_text(arguments.folder, 0)
    Loop(arguments.folder, data, arguments.seed, patience=arguments.patience).run(arguments.kills)
    return 0


if __name__ == "__main__":
    sys.exit(main())
