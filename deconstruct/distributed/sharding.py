"""Sharding, said once: logical axis names of parameters and activations, and the table that maps them to the mesh.

Model code names axes only (`axes=("embed", "heads", None)`, `constrain(x, ("batch", "length", None))`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deconstruct.types import UserError

# Logical axis -> mesh axis (or axes). In order: the first rule of a spec to name a mesh axis keeps it.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "matched_mlp": None,  # a width that follows from a parameter count is often prime
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "act_heads": "tensor",
    "act_vocab": "tensor",
}


def spec(axes: tuple[str | None, ...], ndim: int) -> PartitionSpec:
    """The PartitionSpec of an array of `ndim` axes whose last ones are named `axes` (leading ones: stacked layers)."""
    return PartitionSpec(*([None] * (ndim - len(axes))), *(RULES[axis] if axis else None for axis in axes))


def batch_spec() -> PartitionSpec:
    return PartitionSpec(RULES["batch"])


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins the sharding of an activation under the current mesh (`jax.set_mesh`); without one, returns x as it is.

    An axis that its mesh axes do not divide (the batch of one of the fixed stream, say) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    parts = [
        part if size % _shards(part, mesh) == 0 else None
        for part, size in zip(spec(axes, x.ndim), x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def state_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings for an nnx state (variables with shapes), as a pure dict of the same structure.

    Raises UserError, before anything is compiled, where a mesh axis does not divide a parameter.
    """

    def sharding(path: Any, variable: nnx.Variable) -> NamedSharding:
        shape = variable.shape
        axes = variable.get_metadata().get("axes", ())
        partition = spec(axes, len(shape))
        for size, part in zip(shape, partition, strict=True):
            if part is not None:
                together[part] = math.gcd(together.get(part, 0), size)
            if size % _shards(part, mesh):
                misfits.append((path, shape, size, part))
        return NamedSharding(mesh, partition)

    together: dict[Any, int] = {}  # mesh axis -> what divides every size that it splits
    misfits: list[tuple[Any, tuple[int, ...], int, Any]] = []
    tree = jax.tree_util.tree_map_with_path(sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    if misfits:
        path, shape, size, part = misfits[0]
        raise UserError(_does_not_fit(path, shape, size, part, together[part], mesh))
    return nnx.to_pure_dict(tree)


def _shards(part: str | tuple[str, ...] | None, mesh: Any) -> int:
    names = () if part is None else (part,) if isinstance(part, str) else part
    return math.prod(mesh.shape[name] for name in names)


def _does_not_fit(
    path: Any, shape: tuple[int, ...], size: int, axis: str, divisible: int, mesh: jax.sharding.Mesh
) -> str:
    devices = mesh.size // math.prod(n for name, n in mesh.shape.items() if name not in (axis, "data"))
    fitting = [n for n in range(1, devices + 1) if devices % n == 0 and divisible % n == 0]
    meshes = " or ".join(f"data={devices // n},{axis}={n}" for n in fitting[-2:])
    name = ".".join(str(getattr(entry, "key", entry)) for entry in path)
    return (
        f"config.mesh.{axis}={mesh.shape[axis]} does not divide {size}, an axis of {name} {shape}; {meshes} would fit"
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
