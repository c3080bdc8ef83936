"""What every floor shares: the two streams of a layer, and the error that is the user's to mend. Imports nothing
heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: the key, file or number, and what would do.

    The command line prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """What went wrong around a run through no mistake of the user's: a save that failed, a workdir taken over.

    The command line prints the message without a traceback and exits with status 1.
    """


class PeerError(RunError):
    """Another process of the run is missing, or has failed. The message is one line and names it."""


class Streams(NamedTuple):
    """What flows through the layers, as one pytree.

    `h` is [B, L, d], the hidden states of the batch, or None while only the fixed stream is run.
    `x` is [1, L, d], the stream that does not depend on the batch (random or fixed-text queries and keys),
    or None in a model none of whose layers reads it. None is an empty subtree: whatever acts position by
    position is one `map` over both, without branches. `x` is never concatenated to the batch: B + 1 rows
    would not divide over the devices.
    """

    h: Any
    x: Any = None

    def map(self, function: Callable[..., Any], *others: Streams) -> Streams:
        """Applies `function` to each stream that is there, and to the same stream of `others`."""
        return Streams(
            *(None if own is None else function(own, *rest) for own, *rest in zip(self, *others, strict=True))
        )
