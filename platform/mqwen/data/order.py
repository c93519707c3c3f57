"""The order: which samples every step trains on, a pure function of manifest, seed and epoch.

Shards are cut into runs (neighbouring samples, one read each). An epoch shuffles the runs; consecutive runs make
a window; inside a window the samples are shuffled, packed (pack.py) and the packs dealt into rows. A row is what
one forward pass takes, the same for any number of workers: row i of a job goes to rank i mod workers.

So a window can be planned from the manifest and the indexes of its own shards alone, wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mqwen.data.manifest import Manifest, Shard
from mqwen.data.pack import pack


@dataclass(frozen=True)
class OrderSettings:
    """What the order depends on beside the manifest; part of every run's settings.

    `pack_length` and `image_positions` count expanded positions: a picture's placeholder token takes
    `image_positions` of them.
    """

    seed: int
    pack_length: int
    packs_per_row: int
    image_positions: int
    run_samples: int = 64
    window_runs: int = 16

    def positions(self, tokens: int, images: int) -> int:
        """Expanded positions of what the index counts."""
        return tokens + images * (self.image_positions - 1)


@dataclass(frozen=True, order=True)
class Position:
    """Where the order stands: the next row to train on."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    @classmethod
    def after(cls, place: tuple[int, int, int]) -> Position:
        """The position behind a row. Where that was the window's last, nothing is left of the window to read."""
        epoch, window, row = place
        return cls(epoch, window, row + 1)


@dataclass(frozen=True)
class Run:
    """Samples start..stop of a shard."""

    shard: Shard
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where a window's sample lies: its row of the index, in the shard that the window's run number `run` is of."""

    shard: Shard
    run: int
    key: str
    offset: int
    nbytes: int
    tokens: int
    images: int
    sha256: str


@dataclass(frozen=True)
class WindowPlan:
    """A window's samples in shuffled order and, as indexes into them, its rows: of each row the packs.

    `too_long[n]` are samples that no pack can hold, named with row n, so that a window's are spread over its rows.
    There is a row at least, if need be an empty one, so that none goes unnamed.
    """

    samples: list[Place]
    rows: list[list[list[int]]]
    too_long: list[list[int]]


class Order:
    def __init__(self, manifest: Manifest, settings: OrderSettings) -> None:
        self.manifest, self.settings = manifest, settings
        self._runs_up_to = np.cumsum([-(-shard.samples // settings.run_samples) for shard in manifest.shards])

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        return int(-(-self._runs_up_to[-1] // self.settings.window_runs))

    def window(self, epoch: int, window: int) -> list[Run]:
        """The runs of one window, in the order in which they are read."""
        shuffled = self._random(epoch).permutation(self._runs_up_to[-1])
        size = self.settings.window_runs
        return [self._run(int(number)) for number in shuffled[window * size : (window + 1) * size]]

    def plan(self, epoch: int, window: int, index: Callable[[Shard], pa.Table]) -> WindowPlan:
        """Shuffles and packs a window's samples. `index(shard)` gives that shard's index."""
        samples = [
            Place(shard=run.shard, run=number, **row)
            for number, run in enumerate(self.window(epoch, window))
            for row in index(run.shard).slice(run.start, run.stop - run.start).to_pylist()
        ]
        random = self._random(epoch, window)
        samples = [samples[i] for i in random.permutation(len(samples))]
        packs, too_long = pack(
            [self.settings.positions(s.tokens, s.images) for s in samples], self.settings.pack_length
        )
        # Packing sorts by length; without a shuffle the rows of a window would run from long samples to short.
        packs = [packs[i] for i in random.permutation(len(packs))]
        per_row = self.settings.packs_per_row
        rows = [packs[i : i + per_row] for i in range(0, len(packs), per_row)] or [[]]
        return WindowPlan(samples, rows, [too_long[n :: len(rows)] for n in range(len(rows))])

    def _run(self, number: int) -> Run:
        at = int(np.searchsorted(self._runs_up_to, number, side="right"))
        shard, size = self.manifest.shards[at], self.settings.run_samples
        start = (number - (int(self._runs_up_to[at - 1]) if at else 0)) * size
        return Run(shard, start, min(start + size, shard.samples))

    def _random(self, epoch: int, *window: int) -> np.random.Generator:
        # A spawn key, because as a plain list (epoch,) and (epoch, 0) would seed the same.
        return np.random.default_rng(np.random.SeedSequence(self.settings.seed, spawn_key=(epoch, *window)))
