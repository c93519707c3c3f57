"""The stream on Ray Data: killed readers, bad samples, wrong positions. test_digest.py has its order."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest
import ray.data

from mqwen.data.batch import Batch
from mqwen.data.dataset import open_dataset
from mqwen.data.errors import DataError
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.data.windows import LISTED
from mqwen.model import MQWenProcessor
from mqwen.telemetry import reading
from tests.data.digest import digest, plain_rows, ranks_steps
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
    return Stream(Order([open_dataset(dataset)], SETTINGS), processor, rows=ROWS)


@pytest.fixture(scope="module")
def plain(stream: Stream) -> list[Batch]:
    return list(islice(plain_rows(stream), ROWS))


def received(
    stream: Stream,
    workers: int,
    position: Position | None = None,
    rows: int = ROWS,
    on_step: Callable[[int, int], None] = lambda rank, step: None,
) -> str:
    """The digest of the rows from a position on, dealt one by one."""
    return digest(ranks_steps(stream, workers, 1, rows, position or Position(), on_step))


def expected(rows: list[Batch]) -> str:
    return digest([[row] for row in rows])


def test_the_plain_loop_has_all_kinds_of_rows(stream: Stream, plain: list[Batch]) -> None:
    assert {row.place[0] for row in plain} >= {0, 1}  # more than an epoch
    assert len({row.images for row in plain}) > 2
    reasons = {reason.split(":")[0] for row in plain for reason in row.quarantined.values()}
    assert reasons == {"picture", "too long"}
    epoch = [row for row in plain if row.place[0] == 0]
    keys = [key for row in epoch for key in [*row.keys, *row.quarantined]]
    assert sorted(keys) == sorted(f"sample-{seed:04d}" for seed in range(60))


def test_a_list_of_windows_that_is_never_made_whole(stream: Stream, plain: list[Batch]) -> None:
    assert received(replace(stream, rows=100_000_000), 1) == expected(plain)


def test_windows_are_listed_as_they_are_read(stream: Stream) -> None:
    """Ray would list a hundred thousand at a thousand a second."""
    found = replace(stream, rows=100_000).start(Position())
    executor = found._create_executor()
    try:
        rows = found._build_bundle_iterator(executor)
        for _ in range(ROWS):
            rows.get_next()
            _, lister, reader = (operator.metrics for operator in executor._topology)
            assert lister.num_task_outputs_generated - reader.num_tasks_submitted <= 2 * LISTED
    finally:
        executor.shutdown(force=True)


def test_after_a_windows_last_row_comes_the_next_window(stream: Stream, plain: list[Batch]) -> None:
    done = next(n for n in range(3, ROWS) if plain[n].place[2] > plain[n + 1].place[2])
    position = Position.after(plain[done].place)
    assert received(stream, 1, position, 4) == expected(plain[done + 1 : done + 5])


def test_killed_readers_change_nothing(stream: Stream, plain: list[Batch]) -> None:
    """SIGKILL of every process that reads or lists windows, twice in the middle of the run.

    There are many more rows to read than are taken, so that the readers are at work all the time.
    """
    killed: list[str] = []

    def kill(rank: int, step: int) -> None:
        if rank == 0 and step in (4, 15):
            for process in psutil.Process().children(recursive=True):
                name = process.name()
                if "ReadWindows" in name or "MapBatches" in name:
                    process.kill()
                    killed.append(name)

    assert received(replace(stream, rows=5000), 2, on_step=kill) == expected(plain)
    assert killed


def test_a_reading_that_begins_again_takes_its_share_of_the_cluster_over(stream: Stream) -> None:
    """Ray Data's shares of the cluster are by the reading's id."""

    def share(name: str) -> str:
        return replace(stream, name=name).split(Position(), 1)[0]._get_dataset_tag()["dataset"]

    first, again, other = share("run"), share("run"), share("other")
    assert first == again
    assert other != first


def test_the_metrics_are_those_of_the_rows(tmp_path: Path, processor: MQWenProcessor) -> None:
    samples = [random_sample(seed) for seed in range(60)]
    samples[9].pictures[0] = b"no picture"
    dataset = write_dataset(tmp_path / "measured", processor, samples)
    order = Order([open_dataset(dataset)], SETTINGS)
    measured = Stream(order, processor, rows=ROWS)
    rows = [row for step in ranks_steps(measured, 1, 1, ROWS, Position()) for row in step]
    reasons = Counter(reason.split(":")[0] for row in rows for reason in row.quarantined.values())
    assert reasons.keys() == {"picture", "too long"}

    (node,) = ray.nodes()
    taken = sum(len(row.keys) + len(row.quarantined) for row in rows)
    found = scrape_until(
        [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"],
        lambda one: (
            one.total("ray_mqwen_data_rows_total", dataset="measured") >= ROWS
            and one.total("ray_mqwen_data_samples_total", dataset="measured") >= taken
            and one.total("ray_mqwen_data_quarantined_samples_total", dataset="measured") == reasons.total()
        ),
    )
    assert found.declared() == declared(reading)
    for reason, count in reasons.items():
        assert found.total("ray_mqwen_data_quarantined_samples_total", dataset="measured", reason=reason) == count
    manifest = order.datasets[0].manifest
    shards = manifest.shards.total("nbytes")
    assert found.total("ray_mqwen_data_read_bytes_total", dataset="measured") > shards / 2
    assert found.total("ray_mqwen_data_read_seconds_count", dataset="measured") >= len(manifest.shards)


def test_too_many_bad_samples_stop_the_run(stream: Stream) -> None:
    rows = stream.read(stream.start(Position()).iterator(), Position(), max_bad=0.01)
    with pytest.raises(DataError, match=r"2 of \d+ samples of .* --data.max-bad allows 1.0%") as raised:
        list(islice(rows, ROWS))
    assert "sample-0009: picture: 10 bytes are no picture" in str(raised.value)
    assert "too long: " in str(raised.value)


def test_storage_that_fails_is_named(tmp_path: Path, processor: MQWenProcessor) -> None:
    dataset = write_dataset(tmp_path / "data", processor, [random_sample(seed) for seed in range(60)])
    stream = Stream(Order([open_dataset(dataset)], SETTINGS), processor, rows=ROWS)
    (tmp_path / "data" / "shard-000016.tar").unlink()
    with pytest.raises(DataError, match=r"^\S*/shard-000016\.tar does not exist or is no file$"):
        list(islice(stream.read(stream.start(Position()).iterator(), Position(), 1.0), ROWS))


def test_a_position_that_is_not_the_streams(stream: Stream) -> None:
    rows = stream.read(stream.start(Position()).iterator(), Position(0, 1, 0), max_bad=1.0)
    with pytest.raises(DataError, match=r"the stream starts at \(0, 0, 0\), the checkpoint stands at"):
        next(rows)


def test_another_tokenizers_dataset(tmp_path: Path, processor: MQWenProcessor) -> None:
    dataset = write_dataset(tmp_path, processor, [random_sample(1)])
    opened = open_dataset(dataset)
    other = replace(opened, manifest=replace(opened.manifest, tokenizer="other"))
    with pytest.raises(DataError, match="another tokenizer"):
        Stream(Order([other], SETTINGS), processor, 1)


def test_ray_keeps_no_setting_of_the_stream(stream: Stream) -> None:
    """What makes the order exact is the stream's alone: other datasets of the process keep Ray's defaults."""
    stream.start(Position())
    context = ray.data.DataContext.get_current()
    assert context.target_max_block_size is None or context.target_max_block_size > 1
    assert not context.execution_options.preserve_order
