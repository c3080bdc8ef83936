"""A connection from process 0 to every other, held open as long as they run: the death of one is seen at once.

Without it the others would wait in a collective until JAX's time limit, and be aborted without a name. The connections
are those on which the processes have met (`meeting`). A process that ends in order says so, and why. One that lives
gives a sign of it every second: one that was stopped, or whose machine hangs, keeps its connections and is silent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from deconstruct.types import UserError

GRACE = 2.0  # seconds for the main thread to end by itself once another process has said why it ends
BEAT = 1.0  # seconds between two signs of life
SILENT = 20  # beats of one's own without a sign of another's. No clock: where all were stopped, none is silent
DIED, STOPPED = "has died", f"has given no sign of life for {SILENT * BEAT:g} s"  # by what it has not said itself
# For machines that vanish without closing their connections: after 10 s of silence ask four times, every 5 s.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Peer(NamedTuple):
    """Another process at the end of a connection."""

    process: int
    host: str
    connection: socket.socket
    lines: BinaryIO


class Lifeline:
    """Watches `peers` in a thread: all the others on process 0, and process 0 on them. `failure` is what the first
    process to fail has said, or what is known of it: process, host, message, mistake."""

    def __init__(self, process: int, peers: list[Peer]):
        self.failure: dict[str, Any] | None = None
        self._process, self._peers = process, {peer.process: peer for peer in peers}
        self._leaving = False
        for peer in peers:
            peer.connection.settimeout(None)
            peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    peer.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()
        atexit.register(self.leave)

    def say(self, error: BaseException) -> None:
        """Tells the others why this process ends; the first to do so is heard."""
        if self.failure is None:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._send(
                {
                    "process": self._process,
                    "host": socket.gethostname(),
                    "message": f"has ended: {message}",
                    "mistake": isinstance(error, UserError),
                }
            )

    def leave(self) -> None:
        """Says that this process ends in order. Called when the interpreter ends, but not when it is killed."""
        self._leaving = True
        self._send({"left": True})

    def _watch(self) -> None:
        ears = {process: _Ear(peer.lines) for process, peer in self._peers.items()}
        beat = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, beat - time.monotonic())):
                    for said in ears[key.data.process].words():
                        if said is None:
                            said = _unsaid(key.data, DIED)
                        if said.get("left") or self.failure is not None:
                            selector.unregister(key.fileobj)
                            break
                        if said:
                            self._fail({name: said[name] for name in ("process", "host", "message", "mistake")})
                if time.monotonic() >= beat:
                    beat = time.monotonic() + BEAT
                    self._send({})
                    for key in selector.get_map().values():
                        ear = ears[key.data.process]
                        ear.silent += 1
                        if ear.silent > SILENT and self.failure is None:
                            self._fail(_unsaid(key.data, STOPPED))

    def _fail(self, failure: dict[str, Any]) -> None:
        self.failure = failure
        self._send(failure)  # from process 0 to all the others; to process 0 it is no news
        if failure["message"] not in (DIED, STOPPED):
            time.sleep(GRACE)
        if not self._leaving:
            os.write(2, f"{sentence(failure)}; run the same command to go on from the latest checkpoint\n".encode())
            os._exit(2 if failure["mistake"] else 1)

    def _send(self, words: dict[str, Any]) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # one that is gone needs no news
                peer.connection.sendall(json.dumps(words).encode() + b"\n")


_lifeline: Lifeline | None = None


def hold(process: int, peers: list[Peer]) -> None:
    """Watches these peers until this process ends. Once a process."""
    global _lifeline
    _lifeline = Lifeline(process, peers) if peers else None


def failure() -> dict[str, Any] | None:
    """What is known of the first other process that failed; None as long as none has."""
    return _lifeline.failure if _lifeline is not None else None


@contextlib.contextmanager
def told_to_the_others() -> Iterator[None]:
    """An error inside is said to the other processes, which end as well."""
    try:
        yield
    except BaseException as error:
        if _lifeline is not None:
            _lifeline.say(error)
        raise


def sentence(failure: dict[str, Any]) -> str:
    return f"process {failure['process']} ({failure['host']}) {failure['message']}"


def _unsaid(peer: Peer, message: str) -> dict[str, Any]:
    return {"process": peer.process, "host": peer.host, "message": message, "mistake": False}


class _Ear:
    """What comes from a peer, a line at a time; `silent`: how many beats ago the last word was heard."""

    def __init__(self, lines: BinaryIO):
        self._lines, self._begun, self.silent = lines, b"", 0

    def words(self) -> Iterator[dict[str, Any] | None]:
        """What there is to read: {} is a sign of life, None the end."""
        try:
            came = self._lines.read1(65536)  # type: ignore[attr-defined]  # no more than has come
        except OSError:
            came = b""
        self.silent = 0
        if not came:
            yield None
        *lines, self._begun = (self._begun + came).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                yield None
