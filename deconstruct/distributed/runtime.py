"""The processes of a run: how they find each other, and how a request to stop reaches all of them at the same step."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes (one per host; without these, this process is alone)")
    group.add_argument(
        "--distributed", action="store_true", help="find the others through the cluster (TPU pod, SLURM, ...)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where no cluster tells it")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I")


def start(arguments: argparse.Namespace) -> None:
    """Joins the other processes, if there are any. Must come before anything asks JAX for its devices."""
    explicit = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --num-processes and --process-id go together: all three or none")
        if arguments.distributed:
            raise UserError(
                f"--distributed: --coordinator={arguments.coordinator} says where the others are; leave one out"
            )
        jax.distributed.initialize(*explicit)
    elif arguments.distributed:
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM, seen by every process at one and the same step.

    Alone, a handler sets a flag. In a cluster JAX's preemption service agrees on a step that all processes reach; it
    must be asked at every step.
    """

    def __init__(self) -> None:
        self._received = threading.Event()
        self._alone = jax.process_count() == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received.set()

    def reached(self, step: int) -> bool:
        if self._alone:
            return self._received.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
