"""Which process of which cluster this is, from the command line or from what the cluster has set in the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import NamedTuple

from jax._src import clusters  # JAX has no public name for what `jax.distributed.initialize` detects with

from deconstruct.types import UserError

SKYPILOT_PORT = 8476
LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
EXPLICIT = ("coordinator", "num_processes", "process_id")


class Place(NamedTuple):
    """A process among others. `local_device_ids`: the GPUs of this machine that are its own, () for all, None for what
    JAX makes of it. `devices`: how many there should be over all processes, where the cluster says so."""

    coordinator: str
    processes: int
    process: int
    local_device_ids: tuple[int, ...] | None = None
    devices: int | None = None


def find_place(arguments: argparse.Namespace, timeout: int) -> Place | None:
    """The place that the options and the environment give, or None for a process that is alone.

    Raises UserError for options that do not go together, and where no cluster is found.
    """
    explicit = [getattr(arguments, name) for name in EXPLICIT]
    if all(value is None for value in explicit):
        if arguments.distributed:
            return _in_cluster(arguments.process_per, timeout)
        if arguments.process_per:
            raise UserError(
                f"--process-per={arguments.process_per}: this process is alone; --distributed finds the others"
            )
        return None
    if any(value is None for value in explicit):
        raise UserError("--coordinator, --num-processes and --process-id go together: all three or none")
    coordinator, processes, process = explicit
    if arguments.distributed:
        raise UserError(f"--distributed: --coordinator={coordinator} says where the others are; leave one out")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    if not 0 <= process < processes:
        raise UserError(f"--process-id={process}: expected 0 to {processes - 1}, as --num-processes={processes}")
    return Place(coordinator, processes, process, _local_devices(arguments.process_per, os.environ))


def _in_cluster(process_per: str | None, timeout: int) -> Place:
    # First: SkyPilot's machines may be pods or SLURM nodes, where JAX would look for what SkyPilot does not set.
    if "SKYPILOT_NODE_IPS" in os.environ:
        return skypilot_place(process_per, os.environ)
    local = _local_devices(process_per, os.environ)
    coordinator, processes, process, detected = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, local, None, timeout
    )
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "--distributed: nothing here says where the others are (SLURM's srun, a TPU pod, Kubernetes, Open MPI's "
            "mpirun or SkyPilot); --coordinator, --num-processes and --process-id say it"
        )
    if process_per is None and detected is not None:
        _check_chosen(os.environ)
    return Place(coordinator, processes, process, None if detected is None else tuple(detected))


def skypilot_place(process_per: str | None, environment: Mapping[str, str]) -> Place:
    """One process on each of SkyPilot's nodes, with all of its GPUs."""
    if process_per == "gpu":
        raise UserError("--process-per=gpu: SkyPilot starts one process per node; use --process-per=node")
    hosts = environment["SKYPILOT_NODE_IPS"].split()
    gpus = int(float(environment.get("SKYPILOT_NUM_GPUS_PER_NODE", "0") or 0))
    process = int(environment["SKYPILOT_NODE_RANK"])
    return Place(f"{hosts[0]}:{SKYPILOT_PORT}", len(hosts), process, (), gpus * len(hosts) or None)


def _local_devices(process_per: str | None, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """What `--process-per` means for this process. Device ids count what the process sees, not what the machine has."""
    if process_per is None:
        return None
    if process_per == "node":
        return ()  # not None: JAX would take one GPU per process wherever a local rank is set
    rank = next((int(environment[name]) for name in LOCAL_RANKS if name in environment), None)
    if rank is None:
        raise UserError(
            f"--process-per=gpu: nothing here says which process of its machine this is ({' or '.join(LOCAL_RANKS)}); "
            "start it with srun or mpirun, or set JAX_LOCAL_DEVICE_IDS instead"
        )
    name, visible = _visible(environment)
    if len(visible) == 1:
        return (0,)  # the scheduler has given this process its own GPU, and hidden the others
    if visible and rank >= len(visible):
        raise UserError(
            f"--process-per=gpu: this is process {rank} of its machine, but {name}={','.join(visible)} has "
            f"{len(visible)} GPUs; start as many processes as there are GPUs"
        )
    return (rank,)


def _check_chosen(environment: Mapping[str, str]) -> None:
    """JAX gives each process under SLURM or Open MPI one GPU, without a word, also where it was to have all of them."""
    name, visible = _visible(environment)
    if len(visible) > 1:
        raise UserError(
            f"--distributed: this process sees {len(visible)} GPUs ({name}={','.join(visible)}); say whether it is to "
            "have one of them, --process-per=gpu, or all, --process-per=node"
        )


def _visible(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    name = next((name for name in VISIBLE_DEVICES if environment.get(name)), "")
    return name, environment[name].split(",") if name else []
