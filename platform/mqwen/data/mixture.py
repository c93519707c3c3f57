"""A mixture: which of several datasets each slot of an endless sequence takes its next run from.

Slot i looks at the i-th point of a low-discrepancy sequence, the multiples of the golden ratio modulo 1, and takes
the dataset in whose part of [0, 1) it lies. So after n slots each has had its share to within a few, and how many
slots before n were whose can be had without walking there (`floor_sum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

UNIT = 1 << 32
STEP = 2654435769  # odd, and next to UNIT / golden ratio (Knuth, The Art of Computer Programming 3, 6.4)


@dataclass(frozen=True)
class Mixture:
    """`bounds` cut 0..UNIT into the datasets' parts; `offset` is where slot 0 looks."""

    bounds: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, shares: Sequence[float], seed: int) -> Mixture:
        """`shares` of the slots, in any unit."""
        total = sum(shares)
        inner = [round(UNIT * share / total) for share in accumulate(shares[:-1])]
        offset = int(np.random.default_rng(np.random.SeedSequence(seed)).integers(UNIT))
        return cls((0, *inner, UNIT), offset)

    def at(self, slot: int) -> int:
        """The number of the dataset that this slot takes from."""
        point = (self.offset + slot * STEP) % UNIT
        return int(np.searchsorted(self.bounds, point, side="right")) - 1

    def before(self, slot: int) -> list[int]:
        """How many of the slots before this one take from each dataset."""
        # floor((p + UNIT - b) / UNIT) counts a point p modulo UNIT that is at or past b once more than floor(p / UNIT).
        past = [floor_sum(slot, UNIT, STEP, self.offset + UNIT - bound) for bound in self.bounds]
        return [low - high for low, high in pairwise(past)]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * i + b) / m) for i in 0..n-1, in O(log m) steps.

    Each step of Euclid's algorithm counts lattice points below a line (Graham, Knuth, Patashnik, Concrete Mathematics,
    3.5). All arguments are at least 0, m at least 1.
    """
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            return total
        n, b = divmod(last, m)
        m, a = a, m
