"""Plans: how the layers of a layout are folded into segments, each of which is scanned."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Segment(NamedTuple):
    """`repeats` times the same `unit` of layers, one traced block per layer of the unit."""

    unit: tuple[str, ...]
    repeats: int

    def __len__(self) -> int:  # layers covered
        return len(self.unit) * self.repeats


Plan = tuple[Segment, ...]


def unrolled(layers: tuple[str, ...]) -> Plan:
    """The plan that folds nothing: every layer is traced by itself."""
    return (Segment(tuple(layers), 1),) if layers else ()


def plan(layers: tuple[str, ...]) -> Plan:
    """Folds a layout into the segments that trace the fewest blocks, and among those the fewest segments.

    Compile time then depends on how many unlike layers a unit holds, not on depth. A dynamic program over
    prefixes; cubic in the number of layers, and cached.
    """
    return _plan(tuple(layers))


@functools.lru_cache(maxsize=256)
def _plan(layers: tuple[str, ...]) -> Plan:
    count = len(layers)
    # best[i] = (traced blocks, segments) and the plan of the first i layers.
    best: list[tuple[tuple[int, int], Plan]] = [((0, 0), ())]
    for end in range(1, count + 1):
        candidates = []
        for start in range(end):
            length = end - start
            for unit_length in range(1, length + 1):
                if length % unit_length:
                    continue
                unit = layers[start : start + unit_length]
                if unit * (length // unit_length) == layers[start:end]:
                    (blocks, segments), before = best[start]
                    segment = Segment(unit, length // unit_length)
                    candidates.append(((blocks + unit_length, segments + 1), (*before, segment)))
                    break  # a longer unit of the same span only traces more
        best.append(min(candidates, key=lambda candidate: candidate[0]))
    return best[count][1]


class Slot(NamedTuple):
    """Where a layer's parameters live: segment, position in its unit, and repeat."""

    segment: int
    position: int
    repeat: int


def slots(segments: Plan) -> tuple[Slot, ...]:
    """The slot of each layer, in layer order."""
    return tuple(
        Slot(s, position, repeat)
        for s, segment in enumerate(segments)
        for repeat in range(segment.repeats)
        for position in range(len(segment.unit))
    )
