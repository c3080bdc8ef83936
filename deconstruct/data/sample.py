"""A bounded sample of a text of any size, the same whatever the order in which the text is met.

Documents are cut into excerpts, each excerpt has a draw (a hash of its text), and those with the smallest draws are
kept up to a number of characters: a uniform sample over all documents that can be taken in parallel and merged.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

EXCERPT_CHARACTERS = 2048


def draw(text: str, seed: int) -> int:
    """A number in [0, 2^64) that depends only on the text and the seed."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")


class Sample:
    """The excerpts with the smallest draws, as few as hold `characters` characters (all, while there are fewer).

    `ceiling`: a draw above which nothing is wanted, of a sample that this one is to be merged into.
    """

    def __init__(self, characters: int, seed: int, ceiling: int = 2**64):
        self.characters, self.seed = characters, seed
        self._kept: list[tuple[int, str]] = []  # a heap with the largest draw on top: draws are stored negated
        self._held, self._ceiling = 0, ceiling

    @property
    def ceiling(self) -> int:
        """The draw above which nothing is wanted any more."""
        return -self._kept[0][0] if self._held >= self.characters else self._ceiling

    def add(self, document: str) -> None:
        """Offers each excerpt of a document."""
        for start in range(0, len(document), EXCERPT_CHARACTERS):
            excerpt = document[start : start + EXCERPT_CHARACTERS]
            self._offer(-draw(excerpt, self.seed), excerpt)

    def merge(self, other: Sample) -> None:
        """Offers what another sample of the same seed has kept."""
        for negated, excerpt in other._kept:
            self._offer(negated, excerpt)

    def excerpts(self) -> Iterator[str]:
        """What was kept, smallest draw first."""
        for _, excerpt in sorted(self._kept, key=lambda pair: (-pair[0], pair[1])):
            yield excerpt

    def _offer(self, negated: int, excerpt: str) -> None:
        if -negated > self.ceiling:
            return
        heapq.heappush(self._kept, (negated, excerpt))
        self._held += len(excerpt)
        while self._held - len(self._kept[0][1]) >= self.characters:
            self._held -= len(heapq.heappop(self._kept)[1])
