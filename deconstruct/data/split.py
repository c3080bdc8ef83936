"""Which documents are validation: in the order of their draws, until they hold the share of the tokens asked for.

A draw is a hash of the document's text and the seed, so the choice depends on the documents alone, not on their files,
their order or the workers that read them; texts that are the same share a draw and stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

_BITS = np.uint64(48)  # below the 16 that make a bucket: a document in 65,536 is looked at closely


def last_validation_draw(tables: Callable[[], Iterable[np.ndarray]], fraction: float) -> np.uint64:
    """A document is validation where its draw is at most this. `tables` gives, each time it is called, the records
    of the documents (`tokens`, `draw`) part by part: they are read twice, and one part is in memory at a time.

    The least draw with which validation holds at least `fraction` of all tokens; where nothing would be left to train
    on, the greatest but one.
    """
    held = np.zeros(1 << 16, np.int64)
    for table in tables():
        np.add.at(held, _buckets(table), table["tokens"])
    target = fraction * int(held.sum())
    bucket = int(np.searchsorted(np.cumsum(held), target))
    before = int(held[:bucket].sum())
    below, most = np.uint64(0), np.uint64(0)  # the greatest draw of all, and the greatest less than that
    inside = []
    for table in tables():
        draws = np.unique(table["draw"])[-2:]
        for draw in draws:
            if draw > most:
                below, most = most, draw
            elif below < draw < most:
                below = draw
        inside.append(table[["draw", "tokens"]][_buckets(table) == bucket])
    close = np.concatenate(inside) if inside else np.empty(0, [("draw", "<u8"), ("tokens", "<i8")])
    close.sort(order="draw")
    enough = np.flatnonzero(before + np.cumsum(close["tokens"]) >= target)
    chosen = close["draw"][enough[0]] if len(enough) else most
    return below if chosen == most else chosen


def _buckets(table: np.ndarray) -> np.ndarray:
    return (table["draw"] >> _BITS).astype(np.intp)
