"""Two warpgroups that compute and one that loads for both, through a ring of buffers in shared memory.

A buffer goes round: loaded by the third warpgroup's bulk copies (TMA), read by both others, given back by both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deconstruct.kernels.gpu.tensor_core import ROWS

COMPUTING = 2  # warpgroups
BLOCK = COMPUTING * ROWS  # positions
STAGES = 2  # buffers in the ring
WARPGROUP = "warpgroup"
# 65,536 registers for 3 x 128 threads: what the one that loads gives up, the others take.
REGISTERS_COMPUTING, REGISTERS_LOADING = 240, 24


class Ring(NamedTuple):
    """The barriers of the ring, one a buffer."""

    loaded: Any
    used: Any


def ring(copies: int) -> Ring:
    """Barriers for a ring whose buffers are filled by so many copies each."""
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
    return Ring(loaded, plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES))


def slot_of(step: jax.Array) -> jax.Array:
    return jax.lax.rem(step, jnp.int32(STAGES))


def run(compute: Callable[[jax.Array], None], load: Callable[[jax.Array, jax.Array], None], ring: Ring, steps: Any):
    """Runs `compute(warpgroup)` on the two that compute, and `load(step, slot)` for each step on the third."""
    warpgroup = jax.lax.axis_index(WARPGROUP)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS_COMPUTING, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTING)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS_LOADING, action="decrease")

        def fill(step: jax.Array, _: None) -> None:
            slot = slot_of(step)

            @pl.when(step >= STAGES)
            def _wait() -> None:
                plgpu.barrier_wait(ring.used.at[slot])

            load(step, slot)

        jax.lax.fori_loop(0, steps, fill, None)
