"""The stream: Ray Data reads the order's windows in parallel, and row i reaches rank i mod workers, always.

What makes the mapping exact, whatever the timing: one window is one task; each row is a block of its own
(`target_max_block_size=1`); blocks keep their order (`preserve_order`); and the split gives each block to the rank
with the fewest rows (`equal=False`), in that order. Ray promises none of the last in its documentation, so its version
is pinned and a digest test holds it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)

from mqwen.data.batch import Batch, unpack
from mqwen.data.errors import DataError
from mqwen.data.order import Order, Position
from mqwen.data.pace import Pace
from mqwen.data.quarantine import Quarantine
from mqwen.data.reader import WindowReader
from mqwen.data.row import RowBuilder
from mqwen.data.windows import ListedWhenWanted, ReadBy, Windows, prepare
from mqwen.model import MQWenProcessor

PREFETCHED_ROWS = 2  # a rank's rows on their way while it computes
WINDOWS_AHEAD = 2  # for each CPU of the cluster: one that is being read, and one that is read while it waits its turn
LEAST_AHEAD = 64 << 20  # bytes
ROWS_UNSEEN = 8  # that a reading task goes on beyond those that the scheduler has seen, which looks now and then
# Reading tasks run in processes of their own kind, which they need not share with whoever began the reading: those may
# have imported much more.
READER = {"MQWEN_ROLE": "reader"}
# What the process that begins the reading must have in its environment, or else Ray Data would keep the share of the
# cluster that a killed run was reading with for three minutes, and other runs would get leftovers.
LEASE = {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "5", "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1"}


@dataclass(frozen=True)
class Stream:
    """The rows of an order, epoch after epoch. `rows` is how many a run can want.

    `name`, if any, is the same whenever a run's reading begins again, and no other run's on the cluster: Ray Data lends
    each reading a share of the cluster for a time, which a killed one keeps; one of the same name takes it over.
    """

    order: Order
    processor: MQWenProcessor
    rows: int
    name: str = ""

    def __post_init__(self) -> None:
        """Raises DataError where a dataset's tokens were counted by another tokenizer: its packs would not fit."""
        for dataset in self.order.datasets:
            dataset.check_tokenizer(self.processor.tokenizer.fingerprint)

    def split(self, position: Position, workers: int) -> list[ray.data.DataIterator]:
        """The rows from `position` on, dealt in turn: one iterator for each worker, which may be sent to it."""
        found = self.start(position)
        if self.name:
            found.context.use_legacy_dataset_ids = True  # others would not survive the way to the coordinator
            found._set_uuid(hashlib.sha256(self.name.encode()).hexdigest()[:16])
        return found.streaming_split(workers, equal=False)

    def start(self, position: Position) -> ray.data.Dataset:
        """A Ray dataset of the rows from `position` on, `rows` of them or more."""
        _prepare_readers()
        context = ray.data.DataContext.get_current().copy()
        context.target_max_block_size = 1
        context._max_num_blocks_in_streaming_gen_buffer = ROWS_UNSEEN
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.memory_usage_poll_interval_s = None  # measuring a reader's memory each second costs more than reading
        # Without a limit readers fill the object store with rows for which the run has no use for hours.
        ahead = max(LEAST_AHEAD, WINDOWS_AHEAD * int(ray.cluster_resources()["CPU"]) * self._window_bytes())
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ahead)
        # Nor may Ray hold readers back for what is read and not yet taken: of windows that are read side by side, all
        # but the first wait for it, which then would be read row by row, and no other beside it.
        context.downstream_capacity_backpressure_ratio = None
        context.custom_execution_callback_classes = [Pace]
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, ListedWhenWanted])
        with ray.data.DataContext.current(context):
            # As many windows as rows suffice: each has one at least, but the first, of which none may be left.
            # One list of them at a time, on no CPU, as it waits for the readers. That also keeps Ray from fusing the
            # two, which would read a whole list in one task.
            windows = ray.data.read_datasource(
                Windows(self.rows + 1),
                override_num_blocks=1,  # or Ray would cut the lists' blocks, which are one window each, into pieces
                num_cpus=0,
                concurrency=1,
                runtime_env={"env_vars": READER},
            )
            return windows.map_batches(
                ReadBy(ray.put(WindowReader(self.order, self.processor, position))),
                batch_size=1,
                batch_format="pyarrow",
                runtime_env={"env_vars": READER},
            )

    def _window_bytes(self) -> int:
        """About what a window's rows take: their pictures, and four 8-byte numbers a position of every pack."""
        settings = self.order.settings
        shards = [dataset.manifest.shards for dataset in self.order.datasets]
        samples, images, tokens = (sum(each.total(name) for each in shards) for name in ("samples", "images", "tokens"))
        pixels = 3 * self.processor.image_size**2
        nbytes = (images * pixels + settings.positions(tokens, images) * 32) / samples
        return math.ceil(min(settings.run_samples * settings.window_runs, samples) * nbytes)

    def blank(self) -> Batch:
        """A row without samples: what a rank runs when others have one row more."""
        row = RowBuilder(self.processor, self.order.settings).build([], [], Position(), Position())
        return self._unpack(row)

    def _unpack(self, row: pa.Table) -> Batch:
        return unpack(row, self.order.settings.packs_per_row, self.processor.image_size)

    def read(self, rows: ray.data.DataIterator, start: Position, max_bad: float) -> Iterator[Batch]:
        """This rank's rows.

        Raises DataError where storage fails, or where more than `max_bad` of the samples could not be used (see
        quarantine.py). The first row is asked for at once: Ray gives no rank a row before all have asked, and of more
        ranks than rows in a step some would ask late, and the others wait for them.
        """
        checked, first = self._checked(rows, start, max_bad), Future[list[Batch]]()

        def ask() -> None:
            try:
                first.set_result(list(itertools.islice(checked, 1)))
            except BaseException as error:
                first.set_exception(error)

        threading.Thread(target=ask, name="first-row", daemon=True).start()
        return _from(first, checked)

    def _checked(self, rows: ray.data.DataIterator, start: Position, max_bad: float) -> Iterator[Batch]:
        quarantine = Quarantine(self.order.name, max_bad)
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCHED_ROWS):
            if table.num_rows != 1:
                raise RuntimeError(f"Ray Data put {table.num_rows} rows into a block: their ranks would depend on it")
            if failed := table["failed"][0].as_py():
                raise DataError(failed)
            row = self._unpack(table)
            if row.start != (start.epoch, start.window, start.row):
                raise DataError(f"the stream starts at {row.start}, the checkpoint stands at {start}: start again")
            quarantine.add(row)
            yield row


def _prepare_readers() -> None:
    """Has the processes of the first reading tasks start beside the coordinator, which will ask for them."""
    task = ray.remote(prepare).options(num_cpus=1, runtime_env={"env_vars": READER}, scheduling_strategy="SPREAD")
    for _ in range(int(ray.available_resources().get("CPU", 0))):
        task.remote((WindowReader.__module__, Windows.__module__, Pace.__module__))


def _from(first: Future[list[Batch]], rest: Iterator[Batch]) -> Iterator[Batch]:
    yield from first.result()
    yield from rest
