"""A request to stop, by SIGTERM or Ctrl-C on any process, seen by all processes at one and the same step."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within it, the first SIGTERM or SIGINT asks for an end after the step under way, the second ends the process at
    once, with the status 128 + its number.

    A thread of its own hears them: Python runs a handler only when the main thread is back from what it waits for, and
    that may be minutes of compiling.

    Alone, a process asks itself. Of several, each puts a flag on its devices at every step, and what all read is the
    sum: a sum over the mesh costs less than asking a service, and no process can go on while another stops.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._flags: tuple[jax.Array, jax.Array] | None = None
        self._asked: jax.Array | None = None
        self._sum = jax.jit(jnp.sum)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            hears, self._told = socket.socketpair()
            self._told.setblocking(False)
            self._told_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            threading.Thread(target=self._hear, args=(hears,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._told_before)
            self._told.close()  # which ends the thread

    def _hear(self, hears: socket.socket) -> None:
        with hears:
            while heard := hears.recv(1):
                if heard[0] in SIGNALS:
                    self._handle(heard[0])

    def _handle(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            _say(f"received {name} again: ends now\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        _say(f"received {name}: stops after a step or two, and saves; once more ends it at once\n")

    def reached(self, mesh: jax.sharding.Mesh) -> bool:
        """Whether to stop after this step. To be asked once a step by every process; of several processes it answers
        with what was said a step before, so that nobody waits."""
        if jax.process_count() == 1:
            return self.received is not None
        if self._flags is None:
            self._flags = _flag(mesh, 0), _flag(mesh, 1)
        asked, self._asked = self._asked, self._sum(self._flags[self.received is not None])
        return asked is not None and int(asked) > 0


def _flag(mesh: jax.sharding.Mesh, value: int) -> jax.Array:
    """One number a device, `value` on those of this process."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    here = np.full(len(sharding.addressable_devices), value, np.int32)
    return jax.make_array_from_process_local_data(sharding, here, (mesh.size,))


def _say(text: str) -> None:
    os.write(2, text.encode())  # not by print or logging, whose locks the interrupted code may hold
