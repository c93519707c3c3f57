"""Memory over many epochs of the demo's data, and the object store's peak beside its limit.

python -m tests.benchmarks.memory [--epochs 20]

Two ranks (threads of the driver) take every row. After each epoch: the memory that is each process' own, of the driver
and of the reading tasks together, and what the object store holds. A tenth of a second apart: its peak, and what was
spilled to disk.
"""

import statistics
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
import tyro
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from mqwen.cluster import cluster
from mqwen.data.dataset import open_dataset
from mqwen.data.ingest import Ingest, IngestSettings
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.sources.digits import DigitsSource
from mqwen.data.stream import Stream
from mqwen.storage import locate
from tests.benchmarks.reading import make_processor
from tests.benchmarks.result import write_result

RANKS = 2


@dataclass(frozen=True)
class Memory:
    epochs: int = 20
    pictures: int = 4000


class Store(threading.Thread):
    """Watches the object store, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used = self.peak = self.spilled = 0
        self._state, self._stop_now = get_state_from_address(None), threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.1):
            stats = get_memory_info_reply(self._state).store_stats
            self.used, self.spilled = stats.object_store_bytes_used, stats.spilled_bytes_total
            self.peak = max(self.peak, self.used)

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def own(processes: list[psutil.Process]) -> int:
    return sum(process.memory_full_info().uss for process in processes)


def main() -> None:
    settings = tyro.cli(Memory, description=__doc__)
    found: list[tuple[int, int, int]] = []
    with tempfile.TemporaryDirectory() as local, cluster(cpus=2):
        processor = make_processor(Path(local) / "vocabulary", 48)
        dataset = locate(Path(local) / "data")
        Ingest.prepare(DigitsSource(settings.pictures), dataset, processor, IngestSettings()).run()
        stream = Stream(Order([open_dataset(dataset)], OrderSettings(0, 256, 4, 9)), processor, rows=1_000_000)
        parts = stream.split(Position(), RANKS)
        limit = ray.cluster_resources()["object_store_memory"]
        store, me = Store(), psutil.Process()
        store.start()

        def read(rank: int) -> None:
            epoch = 0
            for batch in stream.read(parts[rank], Position(), 1.0):
                if rank == 0 and batch.place[0] > epoch:
                    epoch = batch.place[0]
                    readers = [p for p in me.children(recursive=True) if "MapBatches" in p.name()]
                    found.append((own([me]), own(readers), store.used))
                    print(f"epoch {epoch}: {[size >> 20 for size in found[-1]]} MiB", flush=True)
                if batch.place[0] >= settings.epochs:
                    return

        with ThreadPoolExecutor(RANKS) as pool:
            list(pool.map(read, range(RANKS)))
        store.stop()
    head = ("epoch", "driver, MiB", "readers, MiB", "object store, MiB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {n} | {' | '.join(str(size >> 20) for size in sizes)} |" for n, sizes in enumerate(found, 1)]
    late = [driver + readers for driver, readers, _ in found[len(found) // 4 :]]
    middle = statistics.median(late)
    apart = [f"{edge(late) / middle - 1:+.1%}" for edge in (min, max)]
    lines += [
        "",
        f"Driver and readers after a quarter of the epochs: {' to '.join(apart)} of their median.",
        f"The object store's peak was {store.peak >> 20} MiB of {int(limit) >> 20}; {store.spilled >> 20} MiB spilled.",
    ]
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    write_result("memory", f"{about}\n\n{settings.pictures} pictures.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
