"""The stream on Ray Data: the same rows in the same order for any number of workers, from any position."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import psutil
import pytest
import ray.data

from mqwen.data.batch import Batch, unpack
from mqwen.data.errors import DataError
from mqwen.data.manifest import read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.reader import WindowReader
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor
from mqwen.storage import locate
from mqwen.telemetry import reading
from tests.data.making import IMAGE_POSITIONS, random_sample, write_dataset
from tests.scraping import declared, scrape_until

pytestmark = pytest.mark.usefixtures("cluster")

ROWS = 31
SETTINGS = OrderSettings(
    seed=2, pack_length=90, packs_per_row=2, image_positions=IMAGE_POSITIONS, run_samples=5, window_runs=3
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, processor: MQWenProcessor) -> Stream:
    """Sixty samples, of which some are text only, one is too long and one cannot be read."""
    samples = [random_sample(seed) for seed in range(60)]
    samples[9].pictures[0] = b"no picture"
    dataset = write_dataset(tmp_path_factory.mktemp("data"), processor, samples)
    return Stream(dataset, Order(read_manifest(dataset), SETTINGS), processor, rows=ROWS)


@pytest.fixture(scope="module")
def plain(stream: Stream) -> list[Batch]:
    """The rows by a loop in this process."""
    reader = WindowReader(stream.dataset, stream.order, stream.processor, Position())
    tables = (row for window in range(1000) for row in reader.rows(window))
    side, packs = stream.processor.image_size, SETTINGS.packs_per_row
    return [unpack(table, packs, side) for table in islice(tables, ROWS)]


def digest(rows: list[Batch]) -> str:
    """Over each row's place, keys and tensors, in the order of the rows."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps([row.place, row.keys, row.quarantined, row.supervised, row.positions]).encode())
        for name in sorted(row.inputs):
            sha.update(f"{name} {row.inputs[name].dtype} {tuple(row.inputs[name].shape)}".encode())
            sha.update(row.inputs[name].numpy().tobytes())
    return sha.hexdigest()


def consume(
    stream: Stream,
    workers: int,
    rows: int,
    position: Position | None = None,
    on_row: Callable[[int], None] = lambda number: None,
) -> list[list[Batch]]:
    """What each of `workers` receives of the first `rows` rows."""
    start = position or Position()
    parts = stream.split(start, workers)

    def read(rank: int) -> list[Batch]:
        found = []
        for number, row in enumerate(islice(stream.read(parts[rank], start, 0.5), len(range(rank, rows, workers)))):
            found.append(row)
            on_row(rank + number * workers)
        return found

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(read, range(workers)))


def dealt(parts: list[list[Batch]]) -> list[Batch]:
    """The rows in their order, if row i went to rank i mod workers."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def test_the_plain_loop_has_all_kinds_of_rows(stream: Stream, plain: list[Batch]) -> None:
    assert {row.place[0] for row in plain} >= {0, 1}  # more than an epoch
    assert len({row.images for row in plain}) > 2
    reasons = {reason.split(":")[0] for row in plain for reason in row.quarantined.values()}
    assert reasons == {"picture", "too long"}
    epoch = [row for row in plain if row.place[0] == 0]
    keys = [key for row in epoch for key in [*row.keys, *row.quarantined]]
    assert sorted(keys) == sorted(f"sample-{seed:04d}" for seed in range(60))


@pytest.mark.parametrize("workers", [3, pytest.param(5, marks=pytest.mark.soak)])
def test_the_same_rows_for_any_number_of_workers(stream: Stream, plain: list[Batch], workers: int) -> None:
    parts = consume(stream, workers, ROWS)
    assert [len(part) for part in parts] == [len(range(rank, ROWS, workers)) for rank in range(workers)]
    assert [row.place for row in dealt(parts)] == [row.place for row in plain]
    assert digest(dealt(parts)) == digest(plain)


def test_one_worker_and_a_list_of_windows_that_is_never_made_whole(stream: Stream, plain: list[Batch]) -> None:
    (part,) = consume(replace(stream, rows=100_000_000), 1, ROWS)
    assert digest(part) == digest(plain)


def test_after_a_stop_the_rows_go_on(stream: Stream, plain: list[Batch]) -> None:
    done = Random().randrange(ROWS - 4)
    position = Position.after(plain[done].place)
    rest = consume(stream, 3, ROWS - done - 1, position)
    assert digest(dealt(rest)) == digest(plain[done + 1 :]), f"resumed after row {done}"
    assert all(row.start == (position.epoch, position.window, position.row) for part in rest for row in part)


def test_after_a_windows_last_row_comes_the_next_window(stream: Stream, plain: list[Batch]) -> None:
    done = next(n for n in range(3, ROWS) if plain[n].place[2] > plain[n + 1].place[2])
    position = Position.after(plain[done].place)
    rows = stream.read(stream.start(position).iterator(), position, 0.5)
    assert digest(list(islice(rows, 4))) == digest(plain[done + 1 : done + 5])


def test_killed_readers_change_nothing(stream: Stream, plain: list[Batch]) -> None:
    """SIGKILL of every process that reads or lists windows, twice in the middle of the run.

    There are many more rows to read than are taken, so that the readers are at work all the time.
    """
    killed: list[str] = []
    lock = threading.Lock()

    def kill(number: int) -> None:
        if number in (4, 15):
            with lock:
                for process in psutil.Process().children(recursive=True):
                    name = process.name()
                    if "ReadWindows" in name or "MapBatches" in name:
                        process.kill()
                        killed.append(name)

    assert digest(dealt(consume(replace(stream, rows=5000), 2, ROWS, on_row=kill))) == digest(plain)
    assert killed


def test_the_metrics_are_those_of_the_rows(tmp_path: Path, processor: MQWenProcessor) -> None:
    samples = [random_sample(seed) for seed in range(60)]
    samples[9].pictures[0] = b"no picture"
    dataset = write_dataset(tmp_path / "measured", processor, samples)
    order = Order(read_manifest(dataset), SETTINGS)
    (rows,) = consume(Stream(dataset, order, processor, rows=ROWS), 1, ROWS)
    reasons = Counter(reason.split(":")[0] for row in rows for reason in row.quarantined.values())
    assert reasons.keys() == {"picture", "too long"}

    (node,) = ray.nodes()
    found = scrape_until(
        [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"],
        lambda one: (
            one.total("ray_mqwen_data_rows_total", dataset="measured") >= ROWS
            and one.total("ray_mqwen_data_quarantined_samples_total", dataset="measured") == reasons.total()
        ),
    )
    assert found.declared() == declared(reading)
    for reason, count in reasons.items():
        assert found.total("ray_mqwen_data_quarantined_samples_total", dataset="measured", reason=reason) == count
    taken = sum(len(row.keys) + len(row.quarantined) for row in rows)
    assert found.total("ray_mqwen_data_samples_total", dataset="measured") >= taken
    shards = sum(shard.nbytes for shard in order.manifest.shards)
    assert found.total("ray_mqwen_data_read_bytes_total", dataset="measured") > shards / 2
    assert found.total("ray_mqwen_data_read_seconds_count", dataset="measured") >= len(order.manifest.shards)


def test_too_many_bad_samples_stop_the_run(stream: Stream) -> None:
    rows = stream.read(stream.start(Position()).iterator(), Position(), max_bad=0.01)
    with pytest.raises(DataError, match=r"2 of \d+ samples could not be used, data.max_bad allows 1.0%") as raised:
        list(islice(rows, ROWS))
    assert "sample-0009: picture: 10 bytes are no picture" in str(raised.value)
    assert "too long: " in str(raised.value)


def test_a_position_that_is_not_the_streams(stream: Stream) -> None:
    rows = stream.read(stream.start(Position()).iterator(), Position(0, 1, 0), max_bad=1.0)
    with pytest.raises(DataError, match=r"the stream starts at \(0, 0, 0\), the checkpoint stands at"):
        next(rows)


def test_another_tokenizers_dataset(tmp_path: Path, processor: MQWenProcessor) -> None:
    dataset = write_dataset(tmp_path, processor, [random_sample(1)])
    manifest = read_manifest(dataset)
    with pytest.raises(DataError, match="another tokenizer"):
        Stream(locate(tmp_path), Order(replace(manifest, tokenizer="other"), SETTINGS), processor, 1)


def test_ray_keeps_no_setting_of_the_stream(stream: Stream) -> None:
    """What makes the order exact is the stream's alone: other datasets of the process keep Ray's defaults."""
    stream.start(Position())
    context = ray.data.DataContext.get_current()
    assert context.target_max_block_size is None or context.target_max_block_size > 1
    assert not context.execution_options.preserve_order
