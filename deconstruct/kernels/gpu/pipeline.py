"""Two warpgroups that compute and one that loads for both, through a ring of buffers in shared memory.

A buffer goes round: loaded by the third warpgroup's bulk copies (TMA), read by both others, given back by both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deconstruct.kernels.gpu.tensor_core import LANES, ROWS

COMPUTING = 2  # warpgroups
BLOCK = COMPUTING * ROWS  # positions
STAGES = 2  # buffers in the ring
WARPGROUP = "warpgroup"
# 65,536 registers for 3 x 128 threads: what the one that loads gives up, the others take.
REGISTERS_COMPUTING, REGISTERS_LOADING = 232, 40


class Ring(NamedTuple):
    """The barriers of the ring, one a buffer."""

    loaded: Any
    used: Any


def ring(copies: int) -> Ring:
    """Barriers for a ring whose buffers are filled by so many copies each."""
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
    return Ring(loaded, plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES))


class Sequences(NamedTuple):
    """Some sequences of the batch, that share a map: they follow one another in arrays and in buffers.

    A bulk copy has five axes at most: those of tiles of width 64 leave one for the sequences, wider ones do not.
    """

    first: Any  # int32 []
    size: int

    def copies(self, width: int) -> int:
        """How many copies `fetch` starts."""
        return 1 if width == LANES else self.size

    def fetch(self, source: Any, positions: Any, head: Any, tiles: Any, slot: Any, loaded: Any) -> None:
        """source [B, L, heads, width], of which `positions` and `head` go to the buffer `slot` of tiles."""
        for member, buffer in self._pairs(source.shape[-1], slot):
            plgpu.copy_gmem_to_smem(source.at[member, positions, head], tiles.at[buffer], loaded)

    def write(self, tiles: Any, slot: Any, target: Any, positions: Any, head: Any) -> None:
        """The inverse of `fetch`, to be waited for by `plgpu.wait_smem_to_gmem`."""
        for member, buffer in self._pairs(target.shape[-1], slot):
            plgpu.copy_smem_to_gmem(tiles.at[buffer], target.at[member, positions, head])

    def _pairs(self, width: int, slot: Any) -> list[tuple[Any, Any]]:
        start = slot * self.size
        if self.size > 1 and self.copies(width) == 1:
            return [(pl.ds(self.first, self.size), pl.ds(start, self.size))]
        return [(self.first + i, start + i) for i in range(self.size)]


def slot_of(step: jax.Array) -> jax.Array:
    return jax.lax.rem(step, jnp.int32(STAGES))


def run(
    compute: Callable[[jax.Array], None],
    load: Callable[[jax.Array, jax.Array, jax.Array], None],
    ring: Ring,
    steps: jax.Array,
    rounds: int = 1,
) -> None:
    """Runs `compute(warpgroup)` on the two that compute, and `load(round, step, slot)` on the third: for all `steps` of
    each round."""
    warpgroup = jax.lax.axis_index(WARPGROUP)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS_COMPUTING, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTING)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS_LOADING, action="decrease")

        def fill(round_: jax.Array, step: jax.Array, _: None) -> None:
            count = round_ * steps + step
            slot = slot_of(count)

            @pl.when(count >= STAGES)
            def _wait() -> None:
                plgpu.barrier_wait(ring.used.at[slot])

            load(round_, step, slot)

        def all_steps(round_: jax.Array, _: None) -> None:
            jax.lax.fori_loop(0, steps, functools.partial(fill, round_), None)

        jax.lax.fori_loop(0, rounds, all_steps, None)
