"""The processes of a run: how they find each other, and check that all is there."""

from __future__ import annotations

import argparse

import jax

from deconstruct.distributed import lifeline
from deconstruct.distributed.agreement import agree, limit_waiting
from deconstruct.distributed.cluster import find_place
from deconstruct.distributed.meeting import meet
from deconstruct.types import UserError

HEARTBEAT = 50  # seconds without a sign of life after which JAX aborts all; the lifeline is sooner, and says who it was


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes (without these, this process is alone)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others through the cluster: SLURM, a TPU pod, Kubernetes, Open MPI, SkyPilot",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where no cluster tells it")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I")
    group.add_argument(
        "--process-per", choices=("gpu", "node"), help="whether a process has one GPU of its machine, or all of them"
    )
    group.add_argument(
        "--expect-devices", type=int, metavar="N", help="end at once unless there are N devices over all processes"
    )
    group.add_argument(
        "--start-timeout", type=int, metavar="SECONDS", default=600, help="how long the others are waited for"
    )
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept, a folder that all processes share (default: in the workdir, but not on "
        "a CPU)",
    )


def start(arguments: argparse.Namespace) -> None:
    """Joins the other processes, if there are any, and checks that all devices are there. Must come before anything
    asks JAX for its devices.

    Raises UserError for options that do not fit the cluster or its devices, PeerError where a process is missing.
    """
    if arguments.start_timeout < 1:
        raise UserError(f"--start-timeout={arguments.start_timeout}: must be at least 1 second")
    place = find_place(arguments, arguments.start_timeout)
    if place is not None:
        lifeline.hold(place.process, meet(place, arguments.start_timeout))
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            # A list, which may be empty: for None JAX takes one GPU wherever a scheduler has set a local rank.
            None if place.local_device_ids is None else list(place.local_device_ids),
            initialization_timeout=arguments.start_timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    limit_waiting(arguments.start_timeout)
    if arguments.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", arguments.compilation_cache)
    expected = arguments.expect_devices if arguments.expect_devices is not None else place and place.devices
    with lifeline.told_to_the_others():
        agree(
            "devices",
            lambda: {"jax": jax.__version__, "platform": jax.default_backend(), "devices": jax.local_device_count()},
            "all machines must be alike",
        )
        if expected and jax.device_count() != expected:
            raise UserError(
                f"--expect-devices={expected}: {jax.device_count()} {jax.default_backend()} devices are here, "
                f"{jax.local_device_count()} on each of {jax.process_count()} processes"
            )


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0
