"""Processes meet before JAX connects them: a missing one is named, where JAX would abort after its time limit.

Process 0 listens on the coordinator's port, where JAX's own service will be; the others report there and wait for
word that all have come. One line of JSON goes each way. The connections are kept: see `lifeline`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any, BinaryIO

from deconstruct.distributed.cluster import Place
from deconstruct.distributed.lifeline import Peer
from deconstruct.types import PeerError, UserError

_LINE = 65536  # bytes at most
_PATIENCE = 5.0  # seconds for a visitor to say who it is, and beyond the limit for the answer to arrive


def meet(place: Place, timeout: float) -> list[Peer]:
    """Returns when all processes have come, with connections: process 0's to all the others, and theirs to it.

    Raises PeerError, naming those that have not come within `timeout` seconds, and UserError where two say they are the
    same or disagree on how many there are.
    """
    return _host(place, timeout) if place.process == 0 else [_visit(place, timeout)]


def _host(place: Place, timeout: float) -> list[Peer]:
    port = int(place.coordinator.rpartition(":")[2])
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise UserError(
                f"--coordinator={place.coordinator}: cannot listen on port {port} here ({why}); another may be free"
            ) from None
        visitors: dict[int, Peer] = {}
        try:
            _receive(place, server, visitors, deadline, stack)
            missing = sorted(set(range(1, place.processes)) - set(visitors))
            if missing:
                raise PeerError(
                    f"{_processes(missing)} of {place.processes} did not come within {timeout:g} s to "
                    f"{place.coordinator}, where process 0 waits"
                )
        except (UserError, PeerError) as error:
            _answer(visitors, {"refused": str(error), "mistake": isinstance(error, UserError)})
            raise
        _answer(visitors, {"host": socket.gethostname()})
        stack.pop_all()  # they stay connected
        server.close()
        return list(visitors.values())


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _receive(
    place: Place,
    server: socket.socket,
    visitors: dict[int, Peer],
    deadline: float,
    stack: contextlib.ExitStack,
) -> None:
    while len(visitors) < place.processes - 1 and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            visitor, _ = server.accept()
        except TimeoutError:
            return
        stack.enter_context(visitor)
        visitor.settimeout(_PATIENCE)
        lines = visitor.makefile("rb")
        said = _read(lines)
        if said is None or "process" not in said:
            visitor.close()  # not one of us
            continue
        process = said["process"]
        peer = Peer(process, said["host"], visitor, lines)
        if said["processes"] != place.processes:
            visitors[-1] = peer
            raise UserError(
                f"process {process} ({said['host']}) was told of {said['processes']} processes, process 0 of "
                f"{place.processes}; --num-processes must be the same everywhere"
            )
        if process in visitors or process == 0:
            visitors[-1] = peer
            raise UserError(f"two processes are number {process}, one of them on {said['host']}")
        visitors[process] = peer


def _visit(place: Place, timeout: float) -> Peer:
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    said = {"process": place.process, "processes": place.processes, "host": socket.gethostname()}
    reached = False
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, _PATIENCE))
            connection.sendall(json.dumps(said).encode() + b"\n")
            connection.settimeout(left + _PATIENCE)
            reached = True
            lines = connection.makefile("rb")
            answer = _read(lines)
            if answer is not None and "refused" in answer:
                raise (UserError if answer["mistake"] else PeerError)(answer["refused"])
            if answer is not None:
                return Peer(0, answer["host"], connection, lines)
            connection.close()
        time.sleep(0.2)
    what = "left without a word" if reached else "was not found"
    raise PeerError(f"process 0 {what} at {place.coordinator} within {timeout:g} s; this is process {place.process}")


def _read(lines: BinaryIO) -> dict[str, Any] | None:
    """One line of JSON, or None for anything else."""
    try:
        said = json.loads(lines.readline(_LINE))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _answer(visitors: dict[int, Peer], answer: dict[str, Any]) -> None:
    for visitor in visitors.values():
        with contextlib.suppress(OSError):  # one that has gone is missed at once
            visitor.connection.sendall(json.dumps(answer).encode() + b"\n")


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
