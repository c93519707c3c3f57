"""Which windows to read, as a Ray Data source: nothing but their numbers. It needs no torch, as reader.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data.block import BlockMetadata

# Numbers come in lists, one task each: many cost a run's start a millisecond each, long ones have more to do again
# when their node is lost.
MOST_LISTS, LEAST_WINDOWS = 1024, 4096
LISTED = 16  # windows that are listed before a reader is free for them


class Windows(ray.data.Datasource):
    """The numbers 0 to `count` - 1 in the column "window", each a block, made when they are wanted."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._count

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        size = max(LEAST_WINDOWS, -(-self._count // MOST_LISTS))
        lists = [range(first, min(first + size, self._count)) for first in range(0, self._count, size)]
        return [ray.data.ReadTask(partial(_blocks, numbers), _metadata(len(numbers))) for numbers in lists]


def _blocks(windows: range) -> Iterator[pa.Table]:
    return (pa.table({"window": [number]}) for number in windows)


def _metadata(rows: int) -> BlockMetadata:
    return BlockMetadata(num_rows=rows, size_bytes=8 * rows, input_files=None, exec_stats=None)


def prepare(modules: Sequence[str]) -> None:
    """Runs in a process that is going to read."""
    for module in modules:
        importlib.import_module(module)


@dataclass(frozen=True)
class ReadBy:
    """Reads a window by the WindowReader that `reader` refers to. The coordinator holds this, and need not import what
    readers do, which takes a second."""

    reader: ray.ObjectRef

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return ray.get(self.reader)(batch)


class ListedWhenWanted(BackpressurePolicy):
    """Windows are listed as they are read. Ray Data counts bytes, of which they have none to speak of, and would list a
    run's whole supply while its first windows are read, at the cost of half a core."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        lists_windows = any(isinstance(source, InputDataBuffer) for source in op.input_dependencies)
        wanted = all(self._topology[to].total_enqueued_input_blocks() < LISTED for to in op.output_dependencies)
        return None if wanted or not lists_windows else 0
