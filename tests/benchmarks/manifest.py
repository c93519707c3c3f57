"""A manifest of a hundred million samples: from a position to the first batch behind it, and the memory that takes.

python -m tests.benchmarks.manifest [--samples 100000000]

The shards' indexes are links to one file, and their samples lie in one tar: what a window reads is real, 16 indexes of
2,048 rows and a thousand samples with pictures. Ray runs already; each time is that of a new driver's first batch.
"""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

from mqwen.cluster import cluster
from mqwen.data.dataset import open_dataset
from mqwen.data.manifest import Manifest, Shards, read_manifest, write_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import Location
from tests.benchmarks.result import write_result
from tests.data.making import WORDS, random_sample, write_dataset

SHARD = 2048


@dataclass(frozen=True)
class Scale:
    samples: int = 100_000_000
    positions: int = 3
    seed: int = 0


def made(folder: Path, processor: MQWenProcessor, settings: Scale) -> Location:
    """The dataset of so many samples, out of one shard."""
    dataset = write_dataset(folder, processor, [random_sample(seed) for seed in range(SHARD)], SHARD)
    (shard,) = read_manifest(dataset).shards
    shards = []
    for number in range(settings.samples // SHARD):
        os.link(folder / f"{shard.name}.parquet", folder / f"link-{number:06d}.parquet")
        shards.append(asdict(shard) | {"name": f"link-{number:06d}"})
    write_manifest(dataset, Manifest(Shards(shards), processor.tokenizer.fingerprint, {}))
    return dataset


def memory(process: psutil.Process) -> int:
    """Bytes that are this process' own, not shared."""
    return process.memory_full_info().uss


def main() -> None:
    settings = tyro.cli(Scale, description=__doc__)
    random = np.random.default_rng(settings.seed)
    lines = [
        "| position (epoch, window, row) | first batch, s | driver, MiB | its largest reader, MiB |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as local, cluster(cpus=2):
        train_vocabulary([" ".join(WORDS)], 300, Path(local) / VOCABULARY_FILE)
        processor = MQWenProcessor(MQWenTokenizer(Path(local) / VOCABULARY_FILE), image_size=224)
        dataset = made(Path(local) / "data", processor, settings)
        size = (Path(local) / "data" / "manifest.json").stat().st_size
        before = memory(psutil.Process())
        for _ in range(settings.positions):
            started = time.perf_counter()
            order = Order([open_dataset(dataset)], OrderSettings(settings.seed, 2048, 4, 256))
            position = Position(int(random.integers(5)), int(random.integers(order.windows)), 3)
            stream = Stream(order, processor, rows=1_000_000)
            (part,) = stream.split(position, 1)
            batch = next(stream.read(part, position, 1.0))
            seconds = time.perf_counter() - started
            assert batch.place == (position.epoch, position.window, position.row)
            readers = [p for p in psutil.Process().children(recursive=True) if "MapBatches" in p.name()]
            sizes = [memory(psutil.Process()) - before, max(map(memory, readers))]
            lines.append(f"| {batch.place} | {seconds:.1f} | {sizes[0] >> 20} | {sizes[1] >> 20} |")
            del part
    about = (__doc__ or "").split("\n\n")[2].strip()
    shards = settings.samples // SHARD
    text = f"{about}\n\n{shards * SHARD:,} samples, {shards:,} shards, manifest.json of {size >> 20} MiB. The driver's "
    text += "memory is what is added to that of its libraries.\n\n"
    write_result("manifest", text + "\n".join(lines))


if __name__ == "__main__":
    main()
