"""Held-out rows: every rank reads its own from storage, once from beginning to end, each time they are iterated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mqwen.data.batch import Batch, unpack
from mqwen.data.order import Order, Position
from mqwen.data.quarantine import Quarantine
from mqwen.data.reader import WindowReader
from mqwen.model import MQWenProcessor


@dataclass(frozen=True)
class HeldOut:
    """The rows of an order's first epoch. Window i is rank i mod workers', so `order` should have small ones."""

    order: Order
    processor: MQWenProcessor
    max_bad: float

    def share(self, rank: int, workers: int) -> Iterator[Batch]:
        """Raises DataError where more than `max_bad` of the samples could not be used (see quarantine.py)."""
        quarantine = Quarantine(self.order.name, self.max_bad)
        reader = WindowReader(self.order, self.processor, Position())
        for window in range(rank, self.order.windows, workers):
            for table in reader.rows(window):
                row = unpack(table, self.order.settings.packs_per_row, self.processor.image_size)
                quarantine.add(row)
                yield row
