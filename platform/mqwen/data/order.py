"""The order: which samples every step trains on, a pure function of manifests, weights, seed and epoch.

Shards are cut into runs (neighbouring samples, one read each). An epoch shuffles the runs; consecutive runs make
a window; inside a window the samples are shuffled, packed (pack.py) and the packs dealt into rows. A row is what
one forward pass takes, the same for any number of workers: row i of a job goes to rank i mod workers.

Packs seldom come out as whole rows. What a window has over, of its packs the emptiest, waits for the last window of its
group, which packs what its group has over together. So it is not each window that ends with a row cut short, but each
group. The same helps rows of one pack, of which each window's emptiest waits.

Several datasets are mixed by weight, run by run (mixture.py): each goes through epochs of its own, so the mixture
itself is one epoch that never ends.

So a window can be planned from the manifests and the indexes of its own shards alone, or of its group's where it is the
last, wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from mqwen.data.dataset import Dataset
from mqwen.data.manifest import Shard
from mqwen.data.mixture import Mixture
from mqwen.data.pack import pack

MIXTURE_WINDOWS = 1 << 62  # of its one epoch, which never ends
GROUP = 8  # windows. More waste less, and the last of them reads more


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
    """Samples start..stop of a shard of the order's dataset number `dataset`, in that dataset's epoch."""

    dataset: int
    epoch: int
    shard: Shard
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where a window's sample lies: its row of the index, in the shard that the run is of. `run` numbers the window's
    runs, from its `window_runs` on those of the windows before it, of which samples were over."""

    shard: Shard
    run: int
    key: str
    offset: int
    nbytes: int
    tokens: int
    images: int
    sha256: str
    dataset: int = 0


@dataclass(frozen=True)
class WindowPlan:
    """A window's samples in shuffled order and, as indexes into them, its rows: of each row the packs.

    `too_long[n]` are samples that no pack can hold, named with row n, so that a window's are spread over its rows.
    There is a row at least, if need be an empty one, so that none goes unnamed.
    """

    samples: list[Place]
    rows: list[list[list[int]]]
    too_long: list[list[int]]


@dataclass(frozen=True)
class _Packed:
    """A window by itself: its samples in shuffled order, and as indexes into them its packs, those of them that are
    over, and what no pack can hold."""

    samples: list[Place]
    packs: list[list[int]]
    over: list[list[int]]
    too_long: list[int]


class Order:
    """The order of a dataset's samples, or of several that are mixed by `weights`: shares of the samples."""

    def __init__(
        self, datasets: Sequence[Dataset], settings: OrderSettings, weights: Sequence[float] | None = None
    ) -> None:
        self.datasets, self.settings = tuple(datasets), settings
        size = settings.run_samples
        samples = [dataset.manifest.shards.table["samples"].to_numpy() for dataset in datasets]
        self._runs_up_to = [np.cumsum(-(-counts // size)) for counts in samples]
        per_run = [counts.sum() / runs[-1] for counts, runs in zip(samples, self._runs_up_to, strict=True)]
        shares = [weight / mean for weight, mean in zip(weights or [1.0] * len(datasets), per_run, strict=True)]
        self._mixture = Mixture.of(shares, settings.seed)

    @property
    def name(self) -> str:
        return "+".join(dataset.location.name for dataset in self.datasets)

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        return (
            MIXTURE_WINDOWS if len(self.datasets) > 1 else int(-(-self._runs_up_to[0][-1] // self.settings.window_runs))
        )

    def window(self, epoch: int, window: int) -> list[Run]:
        """The runs of one window, in the order in which they are read."""
        size = self.settings.window_runs
        first = window * size
        if len(self.datasets) == 1:
            runs = int(self._runs_up_to[0][-1])
            return [self._run(0, epoch, number) for number in range(first, min(first + size, runs))]
        taken = self._mixture.before(first)
        found = []
        for slot in range(first, first + size):
            dataset = self._mixture.at(slot)
            found.append(self._run(dataset, *divmod(taken[dataset], int(self._runs_up_to[dataset][-1]))))
            taken[dataset] += 1
        return found

    def plan(self, epoch: int, window: int, index: Callable[[Dataset, Shard], pa.Table]) -> WindowPlan:
        """Shuffles and packs a window's samples. `index(dataset, shard)` gives that shard's index."""
        own = self._packed(epoch, window, index)
        samples, packs, per_row = own.samples, own.packs, self.settings.packs_per_row
        first = window - window % GROUP
        if window in (first + GROUP - 1, self.windows - 1):
            over = [samples[i] for items in own.over for i in items]
            for earlier in range(first, window):
                other, ahead = self._packed(epoch, earlier, index), (window - earlier) * self.settings.window_runs
                of_other = (other.samples[i] for items in other.over for i in items)
                over += [replace(place, run=place.run + ahead) for place in of_other]
            packs = packs + [[len(samples) + i for i in items] for items in self._pack(over)[0]]
            samples = samples + over
        rows = [packs[i : i + per_row] for i in range(0, len(packs), per_row)] or [[]]
        return WindowPlan(samples, rows, [own.too_long[n :: len(rows)] for n in range(len(rows))])

    def _packed(self, epoch: int, window: int, index: Callable[[Dataset, Shard], pa.Table]) -> _Packed:
        samples = [
            Place(shard=run.shard, run=number, dataset=run.dataset, **row | {"key": self._key(run, row["key"])})
            for number, run in enumerate(self.window(epoch, window))
            for row in index(self.datasets[run.dataset], run.shard).slice(run.start, run.stop - run.start).to_pylist()
        ]
        random = np.random.default_rng(self._seed(epoch, window))
        samples = [samples[i] for i in random.permutation(len(samples))]
        packs, too_long = self._pack(samples)
        # Packing sorts by length; without a shuffle the rows of a window would run from long samples to short.
        packs = [packs[i] for i in random.permutation(len(packs))]
        per_row = self.settings.packs_per_row
        # A window has a row at least. Of rows of one pack the emptiest is over, which may be nearly empty.
        count = (len(packs) % per_row if per_row > 1 else 1) if len(packs) > per_row else 0
        by_fill = sorted(range(len(packs)), key=lambda n: sum(self._positions(samples[i]) for i in packs[n]))
        over = set(by_fill[:count])
        kept = [items for n, items in enumerate(packs) if n not in over]
        return _Packed(samples, kept, [packs[n] for n in sorted(over)], too_long)

    def _pack(self, samples: Sequence[Place]) -> tuple[list[list[int]], list[int]]:
        return pack([self._positions(sample) for sample in samples], self.settings.pack_length)

    def _positions(self, sample: Place) -> int:
        return self.settings.positions(sample.tokens, sample.images)

    def _key(self, run: Run, key: str) -> str:
        """A key that no other sample of the order has: two datasets may use the same."""
        return key if len(self.datasets) == 1 else f"{self.datasets[run.dataset].location}/{key}"

    def _run(self, dataset: int, epoch: int, number: int) -> Run:
        """The `number`-th run of a dataset's epoch."""
        up_to, size = self._runs_up_to[dataset], self.settings.run_samples
        # Alone, a dataset's epoch is the order's.
        seed = self._seed(epoch) if len(self.datasets) == 1 else self._seed(0, dataset, epoch)
        run = int(_permutation(seed.entropy, seed.spawn_key, int(up_to[-1]))[number])
        at = int(np.searchsorted(up_to, run, side="right"))
        shard = self.datasets[dataset].manifest.shards[at]
        start = (run - (int(up_to[at - 1]) if at else 0)) * size
        return Run(dataset, epoch, shard, start, min(start + size, shard.samples))

    def _seed(self, *key: int) -> np.random.SeedSequence:
        # A spawn key, because as a plain list (epoch,) and (epoch, 0) would seed the same.
        return np.random.SeedSequence(self.settings.seed, spawn_key=key)


@lru_cache(maxsize=8)  # eight bytes a run: a window of a mixture looks at several datasets' epochs
def _permutation(entropy: int, spawn_key: tuple[int, ...], length: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=spawn_key)).permutation(length)
