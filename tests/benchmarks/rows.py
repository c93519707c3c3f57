"""What a row costs on its way from a reading task to a rank, and the split over many ranks.

python -m tests.benchmarks.rows [--ranks 64]

The samples are a few words of text: reading and packing them costs next to nothing, so what is left is Ray Data's and
the object store's work for each row. A row is a fixed group of packs (`packs_per_row`), the same for any number of
ranks: that is how the cost of a pack is kept small. Ranks are threads that do nothing with their rows.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from mqwen.cluster import cluster
from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor
from mqwen.storage import Location
from tests.benchmarks.reading import make_processor, make_texts
from tests.benchmarks.result import write_result

PACK = 256


@dataclass(frozen=True)
class Rows:
    ranks: int = 64
    rows: int = 600  # measured, of each kind
    samples: int = 65_536


def stream_of(dataset: Location, processor: MQWenProcessor, packs_per_row: int) -> Stream:
    settings = OrderSettings(0, PACK, packs_per_row, image_positions=4)
    return Stream(Order([open_dataset(dataset)], settings), processor, rows=1_000_000)


def alone(dataset: Location, processor: MQWenProcessor, packs_per_row: int, rows: int) -> float:
    """Rows a second of one rank."""
    stream = stream_of(dataset, processor, packs_per_row)
    (part,) = stream.split(Position(), 1)
    batches = stream.read(part, Position(), 1.0)
    for _ in islice(batches, rows // 5):
        pass
    started = time.perf_counter()
    assert sum(1 for _ in islice(batches, rows)) == rows
    return rows / (time.perf_counter() - started)


def split(dataset: Location, processor: MQWenProcessor, ranks: int, rows: int) -> tuple[float, list[float]]:
    """Rows a second of all ranks, and of each rank the longest time that it waited for one, in seconds."""
    stream = stream_of(dataset, processor, 4)
    parts = stream.split(Position(), ranks)
    each = rows // ranks

    def read(rank: int) -> tuple[float, float, float]:
        batches, waits = stream.read(parts[rank], Position(), 1.0), []
        next(batches)
        started = last = time.perf_counter()
        for _ in islice(batches, each):
            waits.append(time.perf_counter() - last)
            last = time.perf_counter()
        assert len(waits) == each
        return started, last, max(waits)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(read, range(ranks)))
    seconds = max(end for _, end, _ in found) - min(start for start, _, _ in found)
    return ranks * each / seconds, [wait for _, _, wait in found]


def main() -> None:
    settings = tyro.cli(Rows, description=__doc__)
    lines = ["| packs a row | rows/s | a row, ms | a pack, ms |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as local, cluster(cpus=2):
        processor = make_processor(Path(local) / "vocabulary", 16)
        dataset = make_texts(Path(local) / "data", processor, settings.samples)
        for packs in (1, 4, 16):
            rate = alone(dataset, processor, packs, settings.rows)
            lines.append(f"| {packs} | {rate:.0f} | {1000 / rate:.2f} | {1000 / rate / packs:.3f} |")
            print(lines[-1], flush=True)
        rate, waits = split(dataset, processor, settings.ranks, 2 * settings.rows)
    lines += [
        "",
        f"{settings.ranks} ranks, 4 packs a row: {rate:.0f} rows/s, {4 * rate:.0f} packs/s. Every rank had the ",
    ]
    lines[-1] += f"same number of rows; the longest wait of a rank for one was {min(waits):.2f} to {max(waits):.2f} s."
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    write_result("rows", f"{about}\n\nPacks of {PACK} positions, text alone.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
