"""Samples a second from JPEG shards (640 x 480, to 224), decoded, tokenized, packed, by as many reading processes each.

python -m tests.benchmarks.throughput [--rounds 5] [--processes 1 2]

- *torch DataLoader*: its workers run the same reader on the same windows and hand the rows over as tensors.
- *webdataset*: its loader over the same shards, its shuffle buffer, and our decoding, tokenizing and packing.
- *ours, S3*: the same dataset from `rclone serve s3` on this machine, which takes its share of the cores.

The consumer does nothing with the rows. With as many reading processes as the machine has cores, what runs beside them
(the consumer, Ray's own processes) takes their time; with fewer it has a core of its own. Contenders take turns; a
figure is the median of their rounds, in steady state: each process' first window is not counted. *Ours beside it* is
the median of the rounds' ratios.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from mqwen.cluster import cluster
from mqwen.data.batch import Batch, unpack
from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, OrderSettings, Place, Position
from mqwen.data.pack import pack
from mqwen.data.reader import WindowReader
from mqwen.data.row import Entry, RowBuilder
from mqwen.data.sample import Sample
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, locate
from tests.benchmarks.reading import make_photos, make_processor, steady
from tests.benchmarks.result import write_result
from tests.conftest import KEYS

SETTINGS = OrderSettings(0, pack_length=2048, packs_per_row=4, image_positions=256, run_samples=64, window_runs=16)
WINDOW = 1024  # samples


@dataclass(frozen=True)
class Throughput:
    """`s3` measures ours from S3 beside ours from the disk, and not the others' loaders."""

    rounds: int = 5
    processes: tuple[int, ...] = (1, 2)
    samples: int = 2048
    measured: int = 8192  # in whole rounds of the processes' windows, whose rows come together
    s3: bool = False


def ours(dataset: Location, processor: MQWenProcessor) -> Iterator[int]:
    stream = Stream(Order([open_dataset(dataset)], SETTINGS), processor, rows=100_000)
    (part,) = stream.split(Position(), 1)
    for batch in stream.read(part, Position(), 1.0):
        yield len(batch.keys)


def empty_pipeline() -> Iterator[int]:
    """What every pipeline of Ray Data does before its first batch."""
    import ray.data

    (part,) = ray.data.range(8, override_num_blocks=8).map_batches(lambda batch: batch).streaming_split(1, equal=False)
    for batch in part.iter_batches(batch_size=None):
        yield len(batch["id"])


def of_torch(dataset: Location, processor: MQWenProcessor, processes: int) -> Iterator[int]:
    import torch.utils.data as data

    order = Order([open_dataset(dataset)], SETTINGS)

    class Windows(data.IterableDataset):
        def __iter__(self) -> Iterator[Batch]:
            info = data.get_worker_info()
            reader = WindowReader(order, processor, Position())
            for number in itertools.count(info.id, info.num_workers):
                yield from (
                    unpack(table, SETTINGS.packs_per_row, processor.image_size) for table in reader.rows(number)
                )

    loader = data.DataLoader(Windows(), batch_size=None, num_workers=processes, prefetch_factor=4)
    for batch in loader:
        yield len(batch.keys)


def of_webdataset(dataset: Location, processor: MQWenProcessor, processes: int) -> Iterator[int]:
    import webdataset

    builder = RowBuilder(processor, SETTINGS)

    def sample(entry: dict) -> Sample:
        return Sample(entry["__key__"], json.loads(entry["json"])["messages"], [entry["0.jpg"]])

    def packed(samples: Iterator[Sample]) -> Iterator[Batch]:
        while window := list(itertools.islice(samples, WINDOW)):
            lengths = [SETTINGS.positions(len(encode_text(one)), len(one.pictures)) for one in window]
            packs, _ = pack(lengths, SETTINGS.pack_length)
            for at in range(0, len(packs), SETTINGS.packs_per_row):
                rows = packs[at : at + SETTINGS.packs_per_row]
                entries = [[Entry(place(window[i]), window[i]) for i in items] for items in rows]
                table = builder.build(entries, [], Position(), Position())
                yield unpack(table, SETTINGS.packs_per_row, processor.image_size)

    def encode_text(one: Sample) -> list[int]:
        from mqwen.model.chat import encode_chat

        return encode_chat(processor.tokenizer, one.messages).input_ids

    def place(one: Sample) -> Place:
        return Place(shard=None, run=0, key=one.key, offset=0, nbytes=0, tokens=0, images=1, sha256="")  # type: ignore[arg-type]

    shards = [f"{dataset.path}/{shard.file}" for shard in open_dataset(dataset).manifest.shards]
    split = webdataset.shardlists.split_by_worker
    read = webdataset.WebDataset(shards, shardshuffle=100, resampled=False, workersplitter=split).repeat()
    loader = webdataset.WebLoader(
        read.shuffle(WINDOW).map(sample).compose(packed), batch_size=None, num_workers=processes, prefetch_factor=4
    )
    for batch in loader:
        yield len(batch.keys)


@contextmanager
def rclone(folder: Path) -> Iterator[None]:
    """Serves `folder`'s subfolders as buckets; this process' environment says how to reach them."""
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", folder, "--addr", "127.0.0.1:0"]
    command += ["--auth-key", ",".join(KEYS.values()), "--config", "/dev/null"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.:]+", line)))
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"})
        yield
        server.terminate()


def main() -> None:
    settings = tyro.cli(Throughput, description=__doc__)
    head = ("", "processes", "first batch, s", "samples/s", "least and most", "ours beside it")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    empty: list[float] = []
    with tempfile.TemporaryDirectory() as local, rclone(Path(local)):
        processor = make_processor(Path(local) / "vocabulary", 224)
        dataset = make_photos(Path(local) / "bucket" / "data", processor, settings.samples)
        photos = np.mean([shard.nbytes / shard.samples for shard in open_dataset(dataset).manifest.shards])
        for processes in settings.processes:
            contenders = {"ours": partial(ours, dataset, processor)}
            if settings.s3:
                contenders["ours, S3"] = partial(ours, locate("s3://bucket/data"), processor)
            else:
                contenders["torch DataLoader"] = partial(of_torch, dataset, processor, processes)
                contenders["webdataset"] = partial(of_webdataset, dataset, processor, processes)
            with cluster(cpus=processes):
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
                for _ in range(settings.rounds):
                    empty.append(steady(empty_pipeline, 0, 0)[0])
                    for name, start in contenders.items():
                        found[name].append(steady(start, processes * WINDOW, settings.measured))
                        first, rate = found[name][-1]
                        print(f"{name}: first batch {first:.2f} s, {rate:.0f} samples/s", flush=True)
            for name, rounds in found.items():
                first, each = statistics.median(first for first, _ in rounds), [rate for _, rate in rounds]
                beside = statistics.median(
                    mine / other for (_, mine), (_, other) in zip(found["ours"], rounds, strict=True)
                )
                cells = (name, processes, f"{first:.1f}", f"{statistics.median(each):.0f}")
                spread = (f"{min(each):.0f}, {max(each):.0f}", f"{beside:.2f}")
                lines.append(f"| {' | '.join(map(str, cells + spread))} |")
    lines += ["", f"An empty pipeline of Ray Data, split as ours: first batch after {statistics.median(empty):.1f} s."]
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    text = f"{about}\n\n{settings.rounds} rounds of {settings.measured} samples, {photos / 1000:.0f} kB a sample.\n\n"
    write_result("throughput-s3" if settings.s3 else "throughput", text + "\n".join(lines))


if __name__ == "__main__":
    main()
