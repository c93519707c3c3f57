"""What a reading task does: one window, from storage to rows. It needs no torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from mqwen.data.errors import DataError
from mqwen.data.manifest import read_index
from mqwen.data.order import Order, Position
from mqwen.data.row import Entry, RowBuilder
from mqwen.data.sample import Sample, read_sample
from mqwen.model import MQWenProcessor
from mqwen.storage import Location


@dataclass(frozen=True)
class WindowReader:
    dataset: Location
    order: Order
    processor: MQWenProcessor
    start: Position

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        (item,) = batch["id"].to_pylist()
        windows = self.order.windows
        number = self.start.epoch * windows + self.start.window + item
        epoch, window = divmod(number, windows)
        skip = self.start.row if item == 0 else 0
        builder = RowBuilder(self.processor, self.order.settings)
        plan = self.order.plan(epoch, window, lambda shard: _index(self.dataset, shard))
        samples = _Samples(self.dataset, plan.samples)
        for n, packs in enumerate(plan.rows[skip:], start=skip):
            entries = [[Entry(plan.samples[i], samples.read(i)) for i in pack] for pack in packs]
            yield builder.build(entries, Position(epoch, window, n), self.start)


@lru_cache(maxsize=64)
def _index(dataset: Location, shard: str) -> pa.Table:
    return read_index(dataset, shard)


class _Samples:
    """A window's samples, each run of neighbours read from storage at once."""

    def __init__(self, dataset: Location, samples: list[dict[str, Any]]) -> None:
        self._samples = samples
        runs: dict[int, list[dict[str, Any]]] = {}
        for sample in samples:
            runs.setdefault(sample["run"], []).append(sample)
        self._bytes: dict[int, tuple[int, bytes]] = {}
        for number, run in runs.items():
            first = min(sample["offset"] for sample in run)
            last = max(sample["offset"] + sample["nbytes"] for sample in run)
            self._bytes[number] = first, (dataset / f"{run[0]['shard']}.tar").read_range(first, last - first)

    def read(self, number: int) -> Sample | DataError:
        entry = self._samples[number]
        first, data = self._bytes[entry["run"]]
        start = entry["offset"] - first
        try:
            return read_sample(data[start : start + entry["nbytes"]])
        except DataError as error:
            return error
