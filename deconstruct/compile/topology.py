"""Devices that are not here: what compilers need to know of a TPU slice or of NVIDIA GPUs, by name.

TPUs as libtpu names them (`v5e:16x16`, chips along each axis of the torus), GPUs as XLA does (`h100:1x2x8`: partitions,
nodes of each, GPUs of each). No driver, no accelerator, no network.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from deconstruct.types import UserError

GIB = 1 << 30
# Memory of one device (data sheets). A chip of tpu7x is two devices.
TPU_MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB}
GPU_MEMORY = {"h100": 84_942_979_072}
GPU_SHARE = 0.75  # of a GPU's memory, that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


class Topology(NamedTuple):
    name: str
    slices: int
    devices: list[jax.Device]
    memory: int  # bytes that a program has on one device


def absent(name: str, slices: int = 1) -> Topology:
    """The devices of a topology, for compilers alone: they hold no arrays. Raises UserError for a name that means
    nothing, and where the compiler is not installed.

    Must come before anything asks JAX for its devices: this process then runs on the CPU alone.
    """
    kind, _, shape = name.partition(":")
    if not shape or kind not in (*TPU_MEMORY, *GPU_MEMORY):
        kinds = ", ".join((*TPU_MEMORY, *GPU_MEMORY))
        raise UserError(f"--topology={name}: expected one of {kinds} and a shape, as in v5e:16x16 or h100:1x1x8")
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    jax.config.update("jax_platforms", "cpu")
    try:
        if kind in TPU_MEMORY:
            return Topology(name, slices, _tpus(name, slices), TPU_MEMORY[kind])
        if slices > 1:
            raise UserError(f"--slices={slices}: is for TPUs; GPUs of several nodes are written {kind}:1x{slices}x8")
        return Topology(name, 1, _gpus(name, kind, shape), int(GPU_SHARE * GPU_MEMORY[kind]))
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # what the compiler says of a shape, or of itself
        raise UserError(f"--topology={name}: {str(error).strip().splitlines()[0]}") from error


def _tpus(name: str, slices: int) -> list[jax.Device]:
    need("libtpu", name, "aot-tpu")
    # No metadata server is asked; several processes may compile at a time; nothing is said of the missing TPU.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX has them there
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def _gpus(name: str, kind: str, shape: str) -> list[jax.Device]:
    need("jax_plugins.xla_cuda12", name, "aot-cuda")
    need("nvidia.cuda_nvcc", name, "aot-cuda")
    # Autotuning would run candidates on the GPU.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    target = importlib.resources.files(__package__).joinpath(f"{kind}.txtpb").read_text()
    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices)


def need(module: str, name: str, extra: str) -> None:
    """Raises UserError, naming the extra, where a module of a compiler is not there."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        version = importlib.metadata.version("jax")
        raise UserError(
            f"--topology={name}: needs {module}, to go with jax {version}; pip install 'deconstruct[{extra}]'"
        )
