"""What arrays hold, in one number each: the same on any mesh, and another after any single bit has flipped.

The bits of an array are taken as unsigned words and summed, each times an odd number of its place, modulo 2^32. Such a
sum needs no order, so that devices sum what they hold; a flip of one bit changes it by an odd multiple of a power of
two below 2^32, and any other damage but for one in 2^32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS, _OWN = "checksums", "sha256"  # keys that `sign` adds


def checksums(arrays: Sequence[jax.Array]) -> tuple[list[int], list[bool]]:
    """The checksum of each array, and whether all its numbers are finite. All processes that share them must call."""
    if not arrays:
        return [], []
    sums, finite = jax.device_get(_program(tuple(arrays)))
    return [int(value) for value in sums], [bool(value) for value in finite]


def sign(meta: dict[str, Any], sums: dict[str, dict[str, int]]) -> dict[str, Any]:
    """A description, as JSON has it, with the checksums of the arrays it describes and one of its own."""
    said = {**json.loads(json.dumps(meta)), _ARRAYS: sums}
    return {**said, _OWN: _sha256(said)}


def is_signed(found: Any) -> bool:
    """Whether it was once signed, whatever has become of it."""
    return isinstance(found, dict) and (_OWN in found or _ARRAYS in found)


def unsigned(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, int]]] | None:
    """What was signed, and the checksums of the arrays; None where it is not what was signed."""
    said = {key: value for key, value in found.items() if key != _OWN}
    if found.get(_OWN) != _sha256(said):
        return None
    return said, said.pop(_ARRAYS)


def _sha256(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@jax.jit
def _program(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return jnp.stack([_sum(x) for x in arrays]), jnp.stack([_finite(x) for x in arrays])


def _sum(x: jax.Array) -> jax.Array:
    """uint32 []."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = np.dtype(x.dtype).itemsize
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
