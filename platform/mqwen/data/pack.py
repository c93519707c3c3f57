"""Packing: samples into sequences of one length, by best fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Packs item numbers into bins of `capacity`; also returns the items that no bin can hold.

    Best fit decreasing: longest first, each into the fullest bin that still takes it. Ties keep the given order,
    so the result depends on `lengths` alone.
    """
    too_long = [i for i, length in enumerate(lengths) if length > capacity]
    fitting = sorted((i for i, length in enumerate(lengths) if length <= capacity), key=lambda i: -lengths[i])
    packs: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free, pack), sorted: the first that is large enough is the fullest
    for item in fitting:
        place = bisect_left(space, (lengths[item], -1))
        if place == len(space):
            packs.append([item])
            free, number = capacity, len(packs) - 1
        else:
            free, number = space.pop(place)
            packs[number].append(item)
        insort(space, (free - lengths[item], number))
    return packs, too_long
