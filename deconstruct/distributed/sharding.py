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
    "act_kv_heads": "tensor",
    "act_vocab": "tensor",
}


# Of queries, and of keys and values: [batch, length, heads, head_dim].
QUERIES = ("batch", "length", "act_heads", None)
KEYS = ("batch", "length", "act_kv_heads", None)

# The name of an axis, of several that lie in one (sequences and heads of a cache, say), or none.
Axis = str | tuple[str, ...] | None


def spec(axes: tuple[str | None, ...], ndim: int) -> PartitionSpec:
    """The PartitionSpec of an array of `ndim` axes whose last ones are named `axes` (leading ones: stacked layers)."""
    return PartitionSpec(*([None] * (ndim - len(axes))), *(RULES[axis] if axis else None for axis in axes))


def batch_spec() -> PartitionSpec:
    return PartitionSpec(RULES["batch"])


def constrain(x: jax.Array, axes: tuple[Axis, ...]) -> jax.Array:
    """Pins the sharding of an activation under the current mesh (`jax.set_mesh`); without one, returns x as it is.

    An axis that its mesh axes do not divide (the batch of one of the fixed stream, say) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(axes, x.shape, mesh))


def fitting_spec(axes: tuple[Axis, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The PartitionSpec of an array whose last axes are named, as far as a mesh divides them. Of several names on one
    axis the first are given up first."""
    axes = (None,) * (len(shape) - len(axes)) + axes

    def part(axis: Axis, size: int) -> tuple[str, ...] | str | None:
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        for first in range(len(names)):
            rules = [RULES[name] or () for name in names[first:]]
            split = tuple(name for rule in rules for name in ((rule,) if isinstance(rule, str) else rule))
            if size % _shards(split, mesh) == 0:
                return split[0] if len(split) == 1 else split or None
        return None

    return PartitionSpec(*(part(axis, size) for axis, size in zip(axes, shape, strict=True)))


def state_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings for an nnx state (variables with shapes), as a pure dict of the same structure.

    Raises UserError, before anything is compiled, where a mesh axis does not divide a parameter.
    """

    misfits: list[tuple[Any, tuple[int, ...], int, Any]] = []

    def sharding(path: Any, variable: nnx.Variable) -> NamedSharding:
        partition = _partition(variable)
        for size, part in zip(variable.shape, partition, strict=True):
            if size % _shards(part, mesh):
                misfits.append((path, variable.shape, size, part))
        return NamedSharding(mesh, partition)

    tree = jax.tree_util.tree_map_with_path(sharding, state, is_leaf=_is_variable)
    if misfits:
        path, shape, size, part = misfits[0]
        raise UserError(_does_not_fit(path, shape, size, part, split_together(state)[part], mesh))
    return nnx.to_pure_dict(tree)


def split_together(state: Any) -> dict[str, int]:
    """Mesh axis -> what divides every size of an nnx state that it splits: what the axis must divide."""
    together: dict[Any, int] = {}
    for variable in jax.tree.leaves(state, is_leaf=_is_variable):
        for size, part in zip(variable.shape, _partition(variable), strict=True):
            if part is not None:
                together[part] = math.gcd(together.get(part, 0), size)
    return together


def widths_left_whole(state: Any) -> list[int]:
    """Sizes of axes named `matched_mlp`, which no mesh axis splits, in an nnx state."""
    found = set()
    for variable in jax.tree.leaves(state, is_leaf=_is_variable):
        axes = variable.get_metadata().get("axes", ())
        found |= {size for size, axis in zip(variable.shape[::-1], axes[::-1], strict=False) if axis == "matched_mlp"}
    return sorted(found)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _partition(variable: nnx.Variable) -> PartitionSpec:
    return spec(variable.get_metadata().get("axes", ()), len(variable.shape))


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
