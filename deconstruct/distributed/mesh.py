"""The device mesh of a run: axes data, fsdp and tensor, from the configuration.

Devices of one slice (a TPU pod slice, the GPUs of one NVLink domain) are joined by a fast network; slices are joined by
the data centre's. Where there are several, `data` runs over slices, and fsdp and tensor stay within one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from deconstruct.config import Config, MeshConfig
from deconstruct.types import UserError

AXES = ("data", "fsdp", "tensor")

log = logging.getLogger(__name__)


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    together: Mapping[str, int] | None = None,
    key: str = "config.mesh",
) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all), with Auto axes: the compiler propagates shardings from our annotations.

    An axis of -1 takes the devices that remain. Where both data and fsdp are -1, fsdp is the largest that divides
    `together["fsdp"]` (what divides every size of the model that it splits; see `model.placement.mesh_for`), and data
    takes the rest. Raises UserError, which names `key`, where the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = _sizes(config, len(devices), slices, dict(together or {}))
    if math.prod(sizes.values()) != len(devices):
        wanted = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        advice = "what is fixed does not divide them" if "=-1" in wanted else "set one axis to -1 to take what remains"
        raise UserError(f"{key}: {wanted} does not make {len(devices)} devices; {advice}")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(_laid_out(sizes, devices, slices, key), AXES, axis_types=types)


def _sizes(config: MeshConfig, devices: int, slices: int, together: dict[str, int]) -> dict[str, int]:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if sizes["data"] == sizes["fsdp"] == -1 and devices % (slices * sizes["tensor"]) == 0:
        room = devices // slices // sizes["tensor"]
        sizes["fsdp"] = math.gcd(room, together.get("fsdp", 0))
        if sizes["fsdp"] < room:
            log.info(
                "mesh: data=%d, fsdp=%d, tensor=%d (%d does not divide %d, so part of the devices copy parameters)",
                devices // sizes["fsdp"] // sizes["tensor"],
                sizes["fsdp"],
                sizes["tensor"],
                room,
                together["fsdp"],
            )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed == 0:
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    return sizes


def _laid_out(sizes: dict[str, int], devices: list[jax.Device], slices: int, key: str) -> np.ndarray:
    shape = tuple(sizes.values())
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = next((axis for axis in ("data", "fsdp") if sizes[axis] % slices == 0), None)
    if across is None:
        raise UserError(
            f"{key}: neither data={sizes['data']} nor fsdp={sizes['fsdp']} is a multiple of the {slices} slices, and "
            "tensor stays within one; leave data at -1"
        )
    if across != "data":
        log.info("mesh: fsdp=%d runs across %d slices, over the slower network", sizes["fsdp"], slices)
    outer = tuple(slices if axis == across else 1 for axis in AXES)
    inner = tuple(size // parts for size, parts in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def single_device_mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=4,tensor=2` (of `--mesh`); an axis that is not named is 1, but for data, which takes what remains."""
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    for entry in text.split(","):
        axis, _, size = entry.strip().partition("=")
        rest = size == "-1" and axis != "tensor"
        if axis not in AXES or not (rest or (size.isdecimal() and int(size) > 0)):
            raise UserError(f"--mesh={text}: expected sizes of {', '.join(AXES)}, as in fsdp=4,tensor=2")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where a microbatch does not divide over the devices that split the batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    microbatch = config.batch_size // config.accumulation
    if microbatch % shards:
        multiple = shards * config.accumulation
        fits = max(multiple, config.batch_size // multiple * multiple)
        parts = f" / accumulation={config.accumulation}" if config.accumulation > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size}{parts} does not divide over {shards} devices "
            f"(mesh data x fsdp); {fits} would{_with_tensor(config, mesh, microbatch)}"
        )


def _with_tensor(config: Config, mesh: jax.sharding.Mesh, microbatch: int) -> str:
    """The least `tensor` that leaves few enough devices to split the batch, of those that the heads allow; or ""."""
    heads = math.gcd(config.model.num_heads, config.model.kv_heads)
    for tensor in range(mesh.shape["tensor"] + 1, heads + 1):
        if heads % tensor == mesh.size % tensor == 0 and microbatch % (mesh.size // tensor) == 0:
            return f", or config.mesh.tensor={tensor}"
    return ""
