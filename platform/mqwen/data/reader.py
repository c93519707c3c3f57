"""What a reading task does: one window, from storage to rows. It needs no torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from mqwen.data.manifest import Shard, read_index
from mqwen.data.order import Order, Position, WindowPlan
from mqwen.data.row import Entry, RowBuilder, failed_row
from mqwen.data.runs import Samples
from mqwen.errors import UserError
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, retried
from mqwen.telemetry import reading


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of an order that starts at `start`; `rows(n)` are those of the n-th window from there."""

    order: Order
    processor: MQWenProcessor
    start: Position

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """The rows of the window whose number is the one in `batch`; where reading fails, a last one that says why."""
        (number,) = batch["window"].to_pylist()
        try:
            yield from self.rows(number)
        except UserError as error:
            yield failed_row(error)

    def rows(self, number: int) -> Iterator[pa.Table]:
        """Each row as a table of one, with the columns of row.COLUMNS.

        Raises StorageError where storage fails, DataError where an index is not the manifest's. What is wrong with
        single samples is in the rows.
        """
        epoch, window = self.place(number)
        plan = self.plan(number)
        samples = Samples(self.order.datasets, plan.samples)
        builder = RowBuilder(self.processor, self.order.settings)
        for n in range(self.start.row if number == 0 else 0, len(plan.rows)):
            packs = [[Entry(plan.samples[i], samples.read(plan.samples[i])) for i in pack] for pack in plan.rows[n]]
            too_long = [plan.samples[i] for i in plan.too_long[n]]
            epochs = epoch + (window + (n + 1) / len(plan.rows)) / self.order.windows
            row = builder.build(packs, too_long, Position(epoch, window, n), self.start, epochs)
            reading.ROWS.add(dataset=self.order.name)
            reading.SAMPLES.add(sum(map(len, packs)) + len(too_long), dataset=self.order.name)
            yield row

    def place(self, number: int) -> tuple[int, int]:
        """Epoch and window of the n-th window from the start."""
        windows = self.order.windows
        return divmod(self.start.epoch * windows + self.start.window + number, windows)

    def plan(self, number: int) -> WindowPlan:
        return self.order.plan(*self.place(number), lambda dataset, shard: _index(dataset.location, shard))


@lru_cache(maxsize=64)
def _index(dataset: Location, shard: Shard) -> pa.Table:
    return retried(lambda: read_index(dataset, shard))
