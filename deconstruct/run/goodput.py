"""Where the wall time of a run went, over all its sessions: steps that counted, and what was not that.

A step counted if it is in a checkpoint that the run went on from, or in the latest one; of a session that is still
going, all are taken to count. Everything is read from sessions.jsonl (see `session`) and the end of metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from deconstruct.lock import SILENT, Holder
from deconstruct.run.workdir import Workdir

STEPS = "steps"  # the time of steps that counted
LOST = "lost"  # steps, data and saving in vain, and all that a killed or failed session did after it last told
OTHER = "other"  # what no bucket of the clock saw: looking at checkpoints, building the state, logging
Seconds = dict[str, float]
_REPEATED = ("step", "data", "checkpoint")  # buckets that are in vain where their steps do not count


@dataclasses.dataclass(frozen=True)
class Goodput:
    """`seconds` add up to `wall`, the time in sessions; `between` is the time from each one's end to the next."""

    sessions: int
    wall: float
    between: float
    seconds: dict[str, float]
    lost_steps: int

    @property
    def share(self) -> float:
        return self.seconds.get(STEPS, 0.0) / self.wall if self.wall else 0.0


@dataclasses.dataclass
class _Stretch:
    """One session. `marks`: (step, seconds by bucket until then), of each save and the end."""

    start: float
    first: int | None = None
    lost_steps: int = 0
    marks: list[tuple[int, Seconds]] = dataclasses.field(default_factory=list)
    known: Seconds = dataclasses.field(default_factory=dict)
    known_at: float = 0.0
    last: float = 0.0
    end: float | None = None
    status: int | str | None = None


def last_sign(run_dir: Workdir, holder: Holder | None) -> float | None:
    """When a trainer was last heard of: it logs more often than it beats."""
    if holder is None:
        return None
    logged = _modified(run_dir)
    return max(holder.beat, logged) if logged and logged < holder.beat + SILENT else holder.beat


def measure(
    events: Iterable[dict[str, Any]], *, live: bool, until: float, saved: int, logged: list[dict[str, Any]]
) -> Goodput | None:
    """The account of a run; None where it has no session.

    `until`: now, if a session is `live`, else the last sign of life of one that never ended. `saved`: the step of the
    latest finished checkpoint. `logged`: the last records of metrics.jsonl.
    """
    stretches = _stretches(events)
    if not stretches:
        return None
    current = stretches[-1]
    end = current.end = current.end or max(until, current.last)
    ends_well = current.status in (0, 75)
    last_logged = max((record["step"] for record in logged if isinstance(record.get("step"), int)), default=0)
    if live:
        mark = current.marks[-1][0] if current.marks else current.first or 0
        for record in logged:
            if isinstance(record.get("step"), int) and record["step"] > mark and current.first is not None:
                current.known = _sum(current.known, _numbers(record.get("seconds")))
        current.marks.append((max(mark, last_logged), current.known))
    kept: float = float("inf") if live or ends_well else saved
    lost_steps = sum(stretch.lost_steps for stretch in stretches)
    if not live and not ends_well and current.first is not None:
        lost_steps += max(0, last_logged - saved)
    total: Seconds = {}
    for stretch in reversed(stretches):
        complete = stretch.status in (0, 75) or (live and stretch is current)
        total = _sum(total, _spent(stretch, kept, complete))
        kept = min(kept, stretch.first if stretch.first is not None else kept)
    wall = sum((stretch.end or stretch.last) - stretch.start for stretch in stretches)
    between = end - stretches[0].start - wall
    return Goodput(len(stretches), wall, max(0.0, between), total, lost_steps)


def _spent(stretch: _Stretch, kept: float, complete: bool) -> Seconds:
    """The seconds of one session, where steps up to `kept` counted. `complete`: all that it did was recorded."""
    counted: Seconds = next((seconds for step, seconds in reversed(stretch.marks) if step <= kept), {})
    spent = {bucket: seconds for bucket, seconds in stretch.known.items() if bucket not in _REPEATED}
    lost = sum(stretch.known.get(bucket, 0.0) - counted.get(bucket, 0.0) for bucket in _REPEATED)
    spent |= {STEPS if bucket == "step" else bucket: counted.get(bucket, 0.0) for bucket in _REPEATED}
    end = stretch.end or stretch.last
    known_until = end if complete else stretch.known_at
    other = max(0.0, known_until - stretch.start - sum(stretch.known.values()))
    return _sum(spent, {LOST: lost + end - known_until, OTHER: other})


def _stretches(events: Iterable[dict[str, Any]]) -> list[_Stretch]:
    """The sessions in the lines of a file; lines that say nothing usable are passed over."""
    stretches: list[_Stretch] = []
    for event in events:
        kind, time, step = event.get("event"), event.get("time"), event.get("step")
        if not isinstance(time, int | float):
            continue
        if kind == "start":
            stretches.append(_Stretch(start=time, known_at=time, last=time))
        if not stretches:
            continue
        stretch = stretches[-1]
        stretch.last = max(stretch.last, time)
        if kind == "begin" and isinstance(step, int):
            stretch.first, stretch.lost_steps = step, int(_number(event.get("lost_steps")))
        if "seconds" in event:
            stretch.known, stretch.known_at = _numbers(event["seconds"]), stretch.last
            if isinstance(step, int):
                stretch.marks.append((step, stretch.known))
        if kind == "end":
            stretch.end, stretch.status = stretch.last, event.get("status")
    return stretches


def _numbers(seconds: Any) -> Seconds:
    return {name: _number(value) for name, value in seconds.items()} if isinstance(seconds, dict) else {}


def _sum(one: Seconds, other: Seconds) -> Seconds:
    return {bucket: one.get(bucket, 0.0) + other.get(bucket, 0.0) for bucket in one | other}


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0.0


def _modified(run_dir: Workdir) -> float | None:
    """When metrics.jsonl was last written to, where the file system tells."""
    path = os.fspath(run_dir.metrics)
    if "://" in path or not os.path.exists(path):
        return None
    return os.stat(path).st_mtime
