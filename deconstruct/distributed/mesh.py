"""The device mesh of a run: axes data, fsdp and tensor, from the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from deconstruct.config import Config, MeshConfig
from deconstruct.types import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all), with Auto axes: the compiler propagates shardings from our annotations.

    An axis of -1 takes the devices that remain. Raises UserError where the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"config.mesh: {wanted} does not make {len(devices)} devices; set one axis to -1 to take what remains"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def single_device_mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


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
            f"(mesh data x fsdp); {fits} would"
        )
