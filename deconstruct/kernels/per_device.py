"""Kernels on a mesh: each device mixes its own sequences and heads, which is all that a compiler cannot divide itself.

XLA divides a program of its own operations over the mesh; a hand-written kernel it must be given in parts
(`jax.shard_map`). What is divided how follows from the names of the axes and the one table in `distributed.sharding`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from deconstruct.distributed.sharding import KEYS, QUERIES, fitting_spec
from deconstruct.kernels.mask import Mask


def mix_per_device(
    kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array
) -> jax.Array:
    """kernel(q, k, v, mask, **read) on the parts of the arrays that each device of the mesh has.

    q [Bq, L, H, dh]; k [Bq, L, K, dh]; v [Bv, L, K, dv]; what is read is of each position and kv head, [Bq, L, K, ...].
    A batch of one that serves all rows is on every device, and its gradient is summed. Heads are divided where the
    mesh divides both those of queries and those of keys, else every device has them all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, mask, **read)
    queries, keys = fitting_spec(QUERIES, q.shape, mesh), fitting_spec(KEYS, k.shape, mesh)
    values, result = fitting_spec(KEYS, v.shape, mesh), fitting_spec(QUERIES, (v.shape[0], *q.shape[1:]), mesh)
    if queries[2] is None or keys[2] is None:
        queries, keys, values, result = (_whole_heads(x) for x in (queries, keys, values, result))
    along = jax.sharding.PartitionSpec(*keys[:3])
    documents = None if mask.begins is None else jax.sharding.PartitionSpec(keys[0], keys[1])
    divided = jax.shard_map(
        lambda q, k, v, begins, read: kernel(q, k, v, Mask(begins, mask.window), **read),
        in_specs=(queries, keys, values, documents, dict.fromkeys(read, along)),
        out_specs=result,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return divided(q, k, v, mask.begins, read)


def _whole_heads(spec: jax.sharding.PartitionSpec) -> jax.sharding.PartitionSpec:
    return jax.sharding.PartitionSpec(spec[0], spec[1], None, *spec[3:])
