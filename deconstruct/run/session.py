"""One process's turn at a workdir: its lock, and lines in sessions.jsonl from which wall time and lost work follow.

    {"event": "start", "time", "host", "pid", "processes", "devices", "device"}
    {"event": "begin", "time", "step": resumed from, "lost_steps": logged before and now to be done again}
    {"event": "save",  "time", "step", "seconds": by bucket, since the start}
    {"event": "end",   "time", "status": 0, 75, "failed" or "killed", "step" and "seconds" where they are known}

A killed process writes no end; the next one does, with the time of the last sign of life.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax

from deconstruct.lock import Lock, alone_in
from deconstruct.run.clock import Clock
from deconstruct.run.goodput import last_sign
from deconstruct.run.jsonl import append_jsonl, drop_torn_line, readable_jsonl
from deconstruct.run.workdir import Workdir

log = logging.getLogger(__name__)


@contextlib.contextmanager
def session(run_dir: Workdir, clock: Clock) -> Iterator[Session]:
    """The turn of this process, from when `clock` was made; that of process 0 is the run's, the others' do nothing.

    Raises UserError, naming the holder, where another trainer is at work in the workdir.
    """
    if jax.process_index() != 0:
        yield Session(run_dir, clock, None)
        return
    with alone_in(run_dir.folder, "--workdir", "train") as lock:
        turn = Session(run_dir, clock, lock)
        turn.start()
        try:
            yield turn
        except BaseException as error:
            turn.fail(error)
            raise
        turn.end(0)


class Session:
    """What `session` gives. Without a lock, each method does nothing."""

    def __init__(self, run_dir: Workdir, clock: Clock, lock: Lock | None):
        self._run_dir, self._clock, self._lock = run_dir, clock, lock
        self._ended = False

    def check(self) -> None:
        """Raises LockLostError where another trainer has taken the workdir over. Cheap: call it every step."""
        if self._lock:
            self._lock.check()

    def start(self) -> None:
        if self._lock is None:
            return
        drop_torn_line(self._run_dir.sessions)
        events, _ = readable_jsonl(self._run_dir.sessions)
        if events and events[-1].get("event") != "end":
            known = [event["time"] for event in events if isinstance(event.get("time"), float)]
            ended = max([*known, *filter(None, [last_sign(self._run_dir, self._lock.predecessor)])])
            append_jsonl(self._run_dir.sessions, {"event": "end", "time": ended, "status": "killed"})
        here = {"host": socket.gethostname(), "pid": os.getpid()}
        devices = jax.devices()
        there = {"processes": jax.process_count(), "devices": len(devices), "device": devices[0].device_kind}
        append_jsonl(self._run_dir.sessions, {"event": "start", "time": self._clock.started, **here, **there})

    def begin(self, step: int) -> None:
        """Says from which step training goes on. Call it before what was logged after that step is dropped."""
        if self._lock:
            logged, _ = readable_jsonl(self._run_dir.metrics, 1 << 16)
            last = max((record["step"] for record in logged if isinstance(record.get("step"), int)), default=0)
            self._write("begin", step=step, lost_steps=max(0, last - step))

    def save(self, step: int) -> None:
        """Says that a checkpoint of `step` is on its way: once it is finished, the time up to here has counted."""
        self._write("save", step=step, seconds=self._clock.total())

    def end(self, status: int, step: int | None = None) -> None:
        """Says how the turn ended, and after which step, if there was one. Once: what comes later is not said."""
        if not self._ended:
            reached = {} if step is None else {"step": step}
            self._write("end", status=status, **reached, seconds=self._clock.total())
        self._ended = True

    def fail(self, error: BaseException) -> None:
        try:
            first_line = (str(error).splitlines() or [""])[0][:200]
            why = f"{type(error).__name__}: {first_line}"
            self._write("end", status="failed", error=why, seconds=self._clock.total())
        except OSError as unwritable:  # a full disk, and perhaps what the error is about: that one is to be seen
            log.warning("%s: %s", self._run_dir.sessions, unwritable)

    def _write(self, event: str, **rest: Any) -> None:
        if self._lock:
            append_jsonl(self._run_dir.sessions, {"event": event, "time": time.time(), **rest})
