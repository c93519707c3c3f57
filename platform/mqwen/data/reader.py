"""What a reading task does: one window, from storage to rows. It needs no torch, whose import takes seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from mqwen.data.errors import SampleError
from mqwen.data.manifest import Shard, read_index
from mqwen.data.order import Order, Place, Position
from mqwen.data.row import Entry, RowBuilder
from mqwen.data.sample import Sample, read_sample
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, TruncatedFileError, retried
from mqwen.telemetry import reading


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of an order that starts at `start`; `rows(n)` are those of the n-th window from there."""

    dataset: Location
    order: Order
    processor: MQWenProcessor
    start: Position

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """The rows of the window whose number is the one in `batch`."""
        (number,) = batch["window"].to_pylist()
        return self.rows(number)

    def rows(self, number: int) -> Iterator[pa.Table]:
        """Each row as a table of one, with the columns of row.COLUMNS.

        Raises StorageError where storage fails, DataError where an index is not the manifest's. What is wrong with
        single samples is in the rows.
        """
        windows = self.order.windows
        epoch, window = divmod(self.start.epoch * windows + self.start.window + number, windows)
        plan = self.order.plan(epoch, window, lambda shard: _index(self.dataset, shard))
        samples = Samples(self.dataset, plan.samples)
        builder = RowBuilder(self.processor, self.order.settings)
        for n in range(self.start.row if number == 0 else 0, len(plan.rows)):
            packs = [[Entry(plan.samples[i], samples.read(plan.samples[i])) for i in pack] for pack in plan.rows[n]]
            too_long = [plan.samples[i] for i in plan.too_long[n]]
            row = builder.build(packs, too_long, Position(epoch, window, n), self.start)
            reading.ROWS.add(dataset=self.dataset.name)
            reading.SAMPLES.add(sum(map(len, packs)) + len(too_long), dataset=self.dataset.name)
            yield row


@lru_cache(maxsize=64)
def _index(dataset: Location, shard: Shard) -> pa.Table:
    return retried(lambda: read_index(dataset, shard))


class Samples:
    """Samples at known places, each run of neighbours read from storage at once."""

    def __init__(self, dataset: Location, places: list[Place]) -> None:
        runs: dict[int, list[Place]] = {}
        for place in places:
            runs.setdefault(place.run, []).append(place)
        self._runs = {number: _read_run(dataset, run) for number, run in runs.items()}

    def read(self, place: Place) -> Sample | SampleError:
        first, data = self._runs[place.run]
        start = place.offset - first
        try:
            sample = read_sample(data[start : start + place.nbytes])
        except SampleError as error:
            return error
        if sample.key != place.key or sample.sha256() != place.sha256:
            return SampleError("unreadable", "its bytes are not those that were ingested")
        return sample


def _read_run(dataset: Location, run: list[Place]) -> tuple[int, bytes]:
    """Offset and bytes of a run; fewer bytes where the shard was cut short, whose samples are then unreadable."""
    first = min(place.offset for place in run)
    length = max(place.offset + place.nbytes for place in run) - first
    started = time.perf_counter()
    try:
        data = retried(lambda: (dataset / f"{run[0].shard.name}.tar").read_range(first, length))
    except TruncatedFileError as error:
        data = error.data
    reading.READ_SECONDS.observe(time.perf_counter() - started, dataset=dataset.name)
    reading.READ_BYTES.add(len(data), dataset=dataset.name)
    return first, data
