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

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} positions: a position sees itself, so it is at least 1")

    @property
    def is_causal(self) -> bool:
        """Whether it is causal and nothing more."""
        return self.begins is None and self.window is None

    @property
    def documents(self) -> bool:
        """Whether there are borders of documents to keep to."""
        return self.begins is not None

    def narrowed(self, window: int) -> Mask:
        """The same with at most `window` positions in sight."""
        return dataclasses.replace(self, window=window if self.window is None else min(window, self.window))

    def within(self, room: int, start: int | jax.Array) -> Mask:
        """The mask of all `room` positions that a cache holds, of which this one's are those from `start` on.

        Before them, what lies in the document of the first counts as one document, and all else as another: nothing
        that is still to be read can tell.
        """
        if self.begins is None:
            return self
        first = self.begins[:, :1] + start
        before = jnp.where(jnp.arange(room)[None, :] >= first, first, 0)
        begins = jax.lax.dynamic_update_slice_in_dim(before, self.begins + start, start, axis=1)
        return dataclasses.replace(self, begins=begins)

    def begins_of(self, q: jax.Array) -> jax.Array | None:
        """`begins`, for the queries q [B, L, ...] that it goes with. ValueError where it is of another shape."""
        if self.begins is not None and self.begins.shape != q.shape[:2]:
            raise ValueError(f"begins of shape {self.begins.shape} with queries of batch and length {q.shape[:2]}")
        return self.begins

    def refuse_window(self, form: str) -> None:
        """ValueError if there is a window: a running sum does not give back what leaves it."""
        if self.window is not None:
            raise ValueError(f"'{form}' keeps sums over its past, which a window of {self.window} cannot leave again")

    def band(self, rows: int, columns: int, start: int | jax.Array = 0) -> jax.Array:
        """bool [rows, columns]: what all sequences have in common, which is all but the documents."""
        here = (start + jnp.arange(rows))[:, None]
        there = jnp.arange(columns)[None, :]
        seen = here >= there
        return seen if self.window is None else seen & (here - there < self.window)

    def dense(
        self, rows: int, columns: int, start: int | jax.Array = 0, *, begins: jax.Array | None = None
    ) -> jax.Array:
        """bool [B or 1, 1, rows, columns], an axis of heads in the middle: row i stands at position start + i, columns
        are positions from 0.

        `begins` [B, rows], where only some of the mask's positions are rows; they are counted from `start`, as the
        mask's are from its first.
        """
        seen = self.band(rows, columns, start)
        begins = self.begins if begins is None else begins
        if begins is None:
            return seen[None, None]
        there = jnp.arange(columns)[None, None, :]
        return seen[None, None] & (there >= begins[:, :, None] + start)[:, None]


CAUSAL = Mask()


def document_begins(tokens: jax.Array, end_of_text: int, first: jax.Array | None = None) -> jax.Array:
    """The `begins` of a mask, int32 [B, L]: a document ends with `end_of_text`, and the next position begins another.

    tokens int32 [B, L]. `first` int32 [B]: where the document of the first token began, default 0: with it.
    """
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    first = jnp.zeros(tokens.shape[0], jnp.int32) if first is None else first
    after_an_end = jnp.pad(tokens[:, :-1] == end_of_text, ((0, 0), (1, 0)))
    begins = jnp.where(after_an_end, positions[None, :], jnp.where(positions == 0, first[:, None], first.min()))
    return jax.lax.cummax(begins, axis=1)


def cut_begins(begins: jax.Array, size: int) -> jax.Array:
    """[B, L] -> [B, chunks, size], counted from the first position of each chunk; padding is of the last document."""
    batch, length = begins.shape
    chunks = -(-length // size)
    begins = jnp.pad(begins, ((0, 0), (0, chunks * size - length)), mode="edge").reshape(batch, chunks, size)
    return begins - size * jnp.arange(chunks, dtype=begins.dtype)[None, :, None]
