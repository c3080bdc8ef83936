"""The verb `status`: how far runs are, whether they live, and where their time went. Reads only, and needs no JAX."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from typing import Any

from etils import epath

from deconstruct.duration import clock
from deconstruct.lock import SILENT, Holder, read_holder
from deconstruct.run import goodput
from deconstruct.run.goodput import Goodput
from deconstruct.run.jsonl import readable_jsonl
from deconstruct.run.workdir import Workdir, find_workdirs, named
from deconstruct.types import UserError

_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read: about 150 lines
_ORDER = (goodput.STEPS, "compile", "restore", "data", "checkpoint")  # what is shown first of where the time went


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a folder of workdirs, or workdirs")
    parser.add_argument("--json", action="store_true", help="print one array, with an object for each run")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show it again so often, until Ctrl-C")


def run(arguments: argparse.Namespace) -> int:
    if arguments.watch is not None and not arguments.watch > 0:
        raise UserError(f"--watch={arguments.watch}: must be positive")
    try:
        while True:
            found = [status(run_dir, name) for name, run_dir in named(find_workdirs(arguments.folders))]
            text = json.dumps([one.to_dict() for one in found], indent=1) if arguments.json else as_text(found)
            again = arguments.watch is not None
            clear = "\x1b[2J\x1b[H" if again and sys.stdout.isatty() else ""
            print(clear + text, flush=True)
            if not again:
                return 0
            time.sleep(arguments.watch)
    except KeyboardInterrupt:  # how a watch is meant to end
        return 0


@dataclasses.dataclass(frozen=True)
class Status:
    """One run at one moment. None is what is not known. Seconds are of wall time.

    `state`: running; silent (its process is there and gives no sign of life); dead (its process is gone, or has not
    been heard of); stopped (asked to, and saved); failed (with `error`); done; idle (never trained).
    """

    run: str
    workdir: str
    state: str
    host: str | None
    pid: int | None
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: int | None  # the step of the latest finished one
    checkpoint_age: float | None  # seconds since its step was computed
    goodput: Goodput | None
    error: str | None
    damaged: tuple[str, ...]  # what could not be read

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if self.goodput:
            values["goodput"]["share"] = self.goodput.share
        return values


def status(run_dir: Workdir, name: str) -> Status:
    """Reads one workdir. Whatever is damaged in it is named in the result, and ends nothing."""
    now = time.time()
    config, damaged = _config(run_dir)
    logged, bad = readable_jsonl(run_dir.metrics, _TAIL)
    events, bad_events = readable_jsonl(run_dir.sessions)
    damaged += [f"metrics.jsonl: {bad} damaged lines"] * (bad > 0)
    damaged += [f"sessions.jsonl: {bad_events} damaged lines"] * (bad_events > 0)
    holder = read_holder(run_dir.folder)
    saved = _latest_saved(run_dir)
    last: dict[str, Any] = next((r for r in reversed(logged) if isinstance(r.get("step"), int)), {})
    step = max(last.get("step", 0), saved or 0)
    steps = config.get("steps") if isinstance(config.get("steps"), int) else None
    state = _state(holder, events, step, steps)
    live = state in ("running", "silent")
    rate = _finite(last.get("tokens_per_second"))
    times = [e["time"] for e in events if e.get("event") == "save" and e.get("step") == saved and "time" in e]
    started: dict[str, Any] = next((e for e in reversed(events) if e.get("event") == "start"), {})
    where = holder or started
    return Status(
        run=name,
        workdir=str(run_dir.folder),
        state=state,
        host=where.host if isinstance(where, Holder) else where.get("host"),
        pid=where.pid if isinstance(where, Holder) else where.get("pid"),
        step=step,
        steps=steps,
        loss=_finite(last.get("loss")),
        tokens_per_second=rate,
        seconds_left=_left(config, steps, step, rate),
        checkpoint=saved,
        checkpoint_age=now - times[-1] if times else None,
        goodput=goodput.measure(
            events,
            live=live,
            until=now if live else goodput.last_sign(run_dir, holder) or 0.0,
            saved=saved or 0,
            logged=logged,
        ),
        error=events[-1].get("error") if state == "failed" else None,
        damaged=tuple(damaged),
    )


def _config(run_dir: Workdir) -> tuple[dict[str, Any], list[str]]:
    try:
        return run_dir.config_values(), []
    except UserError as error:
        return {}, [str(error)]


def _state(holder: Holder | None, events: list[dict[str, Any]], step: int, steps: int | None) -> str:
    if holder is not None:
        gone = holder.gone()
        if gone or (gone is None and holder.age() > SILENT):
            return "dead"
        return "running" if holder.age() <= SILENT else "silent"
    if steps is not None and step >= steps:
        return "done"
    if not events:
        return "idle"
    last = events[-1]
    if last.get("event") != "end":
        return "dead"
    return "stopped" if last.get("status") in (0, 75) else "failed"


def _latest_saved(run_dir: Workdir) -> int | None:
    """The step of the latest finished checkpoint, as `checkpoint.latest_step` finds it with all of Orbax."""
    folder: epath.Path = run_dir.checkpoints
    if not folder.is_dir():
        return None
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)
    return next((step for step in steps if (folder / str(step) / "meta" / "data.json").exists()), None)


def _left(config: dict[str, Any], steps: int | None, step: int, tokens_per_second: float | None) -> float | None:
    """Seconds until the last step, at the speed of what was logged last."""
    tokens = [config.get("batch_size"), config.get("sequence_length")]
    if steps is None or not tokens_per_second or not all(isinstance(number, int) for number in tokens):
        return None
    return max(0, steps - step) * tokens[0] * tokens[1] / tokens_per_second  # type: ignore[operator]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def as_text(found: list[Status]) -> str:
    """A table with a line for each run; under it where the time of a single run went, and what could not be read."""
    heads = ("run", "state", "step", "loss", "tokens/s", "left", "saved", "goodput", "where")
    rows: list[tuple[str, ...]] = [heads, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for one in found:
        lines += [f"{one.run}: {text}" for text in (*([one.error] if one.error else []), *one.damaged)]
    if len(found) == 1 and found[0].goodput:
        lines.append(_account(found[0].goodput))
    return "\n".join(lines)


def _row(one: Status) -> tuple[str, ...]:
    age = "" if one.checkpoint_age is None else f", {clock(one.checkpoint_age)} ago"
    return (
        one.run,
        one.state,
        f"{one.step:,} of {'?' if one.steps is None else format(one.steps, ',')}",
        "" if one.loss is None else f"{one.loss:.4f}",
        "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
        "" if one.seconds_left is None or one.state == "done" else clock(one.seconds_left),
        "" if one.checkpoint is None else f"{one.checkpoint:,}{age}",
        "" if one.goodput is None else f"{one.goodput.share:.0%}",
        "" if one.host is None else f"{one.host}:{one.pid}",
    )


def _account(one: Goodput) -> str:
    names = [*_ORDER, *sorted(set(one.seconds) - {*_ORDER, goodput.LOST, goodput.OTHER}), goodput.LOST, goodput.OTHER]
    parts = [f"{name} {one.seconds.get(name, 0.0) / (one.wall or 1):.1%}" for name in names]
    sessions = "1 session" if one.sessions == 1 else f"{one.sessions} sessions"
    lost = f" ({one.lost_steps:,} steps done again or to be)" if one.lost_steps else ""
    return f"{clock(one.wall)} in {sessions}: {', '.join(parts)}{lost}"
