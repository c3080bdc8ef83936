"""Parameters by segment (as they run) and by layer (as they are saved), and from one to the other.

A tree of parameters holds `{"stack": {"segments": {s: {position: block}}}, ...}`, each array with the segment's
repeats in front. On disk the same tree holds `{"layers": {"0": block, ...}, ...}`, so that a checkpoint means the
same whatever plan it was written or is read with. Both functions go through any pytree (optimizer state too) that
contains such trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deconstruct.plan import Plan, slots


def take(x: Any, repeat: int) -> Any:
    """One layer of a stacked array, or the shape and sharding of one layer of an abstract array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        sharding = x.sharding and NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
    return x[repeat]


def to_layers(tree: Any, plan: Plan) -> Any:
    """Replaces every stacked `stack` by its `layers`; arrays or abstract arrays."""

    def split(model: Any) -> Any:
        segments = model["stack"]["segments"]
        layers = {
            str(i): jax.tree.map(lambda x, r=slot.repeat: take(x, r), segments[slot.segment][slot.position])
            for i, slot in enumerate(slots(plan))
        }
        return {**{key: value for key, value in model.items() if key != "stack"}, "layers": layers}

    return _map_models(split, tree, "stack")


def to_segments(tree: Any, plan: Plan) -> Any:
    """The inverse of `to_layers`, for any plan of the same layers."""
    where = slots(plan)

    def join(model: Any) -> Any:
        def block(s: int, position: int) -> Any:
            own = [model["layers"][str(i)] for i, w in enumerate(where) if w[:2] == (s, position)]
            return jax.tree.map(lambda *xs: jnp.stack(xs), *own)

        segments = {
            s: {position: block(s, position) for position in range(len(segment.unit))} for s, segment in enumerate(plan)
        }
        return {**{key: value for key, value in model.items() if key != "layers"}, "stack": {"segments": segments}}

    return _map_models(join, tree, "layers")


def rename_layers(model: Any, names: Mapping[int, int]) -> Any:
    """A model by layer with its layers under other indices: {own index: new index}."""
    return {**model, "layers": {str(new): model["layers"][str(old)] for old, new in names.items()}}


def _map_models(function: Callable[[Any], Any], tree: Any, mark: str) -> Any:
    def is_model(node: Any) -> bool:
        return isinstance(node, dict) and mark in node

    return jax.tree.map(lambda node: function(node) if is_model(node) else node, tree, is_leaf=is_model)
