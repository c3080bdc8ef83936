"""Within `jax.shard_map`: over which axes of the mesh arrays vary, which a kernel does not say of its results."""

from __future__ import annotations

import jax


def together(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying over the axes that any of them varies over; gradients are summed over what was added."""
    axes: frozenset[str] = frozenset().union(*(_axes(x) for x in arrays))
    return [_varying(x, axes) for x in arrays]


def like(model: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays, varying over the axes that `model` varies over."""
    return [_varying(x, _axes(model)) for x in arrays]


def _axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
