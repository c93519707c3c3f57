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

from mqwen.data.manifest import Manifest
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

    shard: str
    start: int
    stop: int


@dataclass(frozen=True)
class WindowPlan:
    """A window's samples (the rows of their indexes, in shuffled order) and, as indexes into them, packs in rows."""

    samples: list[dict]
    rows: list[list[list[int]]]
    too_long: list[int]


class Order:
    def __init__(self, manifest: Manifest, settings: OrderSettings) -> None:
        self.manifest, self.settings = manifest, settings
        size = settings.run_samples
        self._runs = [
            Run(shard.name, start, min(start + size, shard.samples))
            for shard in manifest.shards
            for start in range(0, shard.samples, size)
        ]

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        return -(-len(self._runs) // self.settings.window_runs)

    @property
    def least_rows(self) -> int:
        """A lower bound on the rows of one epoch: as if every pack were full."""
        tokens = sum(shard.tokens for shard in self.manifest.shards)
        images = sum(shard.images for shard in self.manifest.shards)
        positions = tokens + images * (self.settings.image_positions - 1)
        return max(self.windows, positions // (self.settings.pack_length * self.settings.packs_per_row))

    def window(self, epoch: int, window: int) -> list[Run]:
        """The runs of one window, in the order in which they are read."""
        shuffled = self._random(epoch).permutation(len(self._runs))
        size = self.settings.window_runs
        return [self._runs[i] for i in shuffled[window * size : (window + 1) * size]]

    def plan(self, epoch: int, window: int, index: Callable[[str], pa.Table]) -> WindowPlan:
        """Shuffles and packs a window's samples. `index(shard)` gives that shard's index."""
        samples = [
            row | {"shard": run.shard, "run": number}
            for number, run in enumerate(self.window(epoch, window))
            for row in index(run.shard).slice(run.start, run.stop - run.start).to_pylist()
        ]
        random = self._random(epoch, window)
        samples = [samples[i] for i in random.permutation(len(samples))]
        lengths = [s["tokens"] + s["images"] * (self.settings.image_positions - 1) for s in samples]
        packs, too_long = pack(lengths, self.settings.pack_length)
        # Packing sorts by length; without a shuffle the rows of a window would run from long samples to short.
        packs = [packs[i] for i in random.permutation(len(packs))]
        per_row = self.settings.packs_per_row
        rows = [packs[i : i + per_row] for i in range(0, len(packs), per_row)]
        return WindowPlan(samples, rows, too_long)

    def _random(self, epoch: int, *window: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, epoch, *window])
