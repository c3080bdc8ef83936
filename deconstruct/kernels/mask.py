"""Which positions a position may look at: one small value that travels from the batch to every form and kernel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Position i sees j where `begins_i <= j <= i` and `i - j < window`: causal always.

    `begins` is int32 [B, L], for each position the first of its document, counted from the first of the L positions
    at hand: negative where the document began before them (in the past that a cache or a state holds), 0 where it
    begins with them. It does not fall along L. None: one document, whose past is everything. `window` is static: a
    position sees itself and the `window` - 1 before it; None: all.
    """

    begins: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def documents(self) -> bool:
        """Whether there are borders of documents to keep to."""
        return self.begins is not None

    def narrowed(self, window: int) -> Mask:
        """The same with at most `window` positions in sight."""
        return dataclasses.replace(self, window=window if self.window is None else min(window, self.window))

    def dense(
        self, rows: int, columns: int, start: int | jax.Array = 0, *, begins: jax.Array | None = None
    ) -> jax.Array:
        """bool [B or 1, 1, rows, columns], an axis of heads in the middle: row i stands at position start + i, columns
        are positions from 0.

        `begins` [B, rows], where only some of the mask's positions are rows; they are counted from `start`, as the
        mask's are from its first.
        """
        here = (start + jnp.arange(rows))[:, None]
        there = jnp.arange(columns)[None, :]
        seen = here >= there
        if self.window is not None:
            seen &= here - there < self.window
        begins = self.begins if begins is None else begins
        if begins is None:
            return seen[None, None]
        return seen[None, None] & (there[None] >= begins[:, :, None] + start)[:, None]


CAUSAL = Mask()
