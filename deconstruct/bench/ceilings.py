"""What the machine at hand gives at most, measured: FLOP/s of a matrix product, bytes a second of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROUNDS = 7


class Ceilings(NamedTuple):
    flops: float  # a second, of a square product in this dtype
    bytes: float  # a second, read and written

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for this work: its arithmetic or its traffic, whichever takes longer (the roofline)."""
        return max(flops / self.flops, moved / self.bytes)


def measure_ceilings(dtype: str) -> Ceilings:
    """On the default device: the best of some rounds, products of 1,024 (on a CPU) or 8,192 rows, copies of 64 MB or
    1 GB."""
    small = jax.default_backend() == "cpu"
    size, numbers = (1024, 1 << 24) if small else (8192, 1 << 28)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    x = jnp.ones((numbers,), jnp.float32)
    return Ceilings(
        2.0 * size**3 / _best(jax.jit(jnp.matmul), a, a),
        2.0 * x.nbytes / _best(jax.jit(lambda x: x + 1), x),
    )


def _best(function: Callable[..., Any], *arguments: jax.Array) -> float:
    """The first call compiles."""
    return min([_seconds(function, *arguments) for _ in range(ROUNDS + 1)][1:])


def _seconds(function: Callable[..., Any], *arguments: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
