"""The order: every sample once an epoch, and a window's plan a function of manifest and settings alone."""

import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqwen.data.dataset import Dataset
from mqwen.data.manifest import INDEX_SCHEMA, Manifest, Shard, Shards
from mqwen.data.order import Order, OrderSettings, Position, WindowPlan
from mqwen.storage import locate

SETTINGS = OrderSettings(seed=5, pack_length=60, packs_per_row=2, image_positions=4, run_samples=7, window_runs=3)


def made_index(dataset: Dataset, shard: Shard) -> pa.Table:
    rows = [
        {"key": f"{shard.name}-{n}", "offset": n, "nbytes": 1, "tokens": 5 + n * 7 % 50, "images": n % 3, "sha256": ""}
        for n in range(shard.samples)
    ]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def made_dataset(name: str, samples: list[int]) -> Dataset:
    """Of shards with so many samples each; it exists nowhere."""
    shards = [asdict(Shard(str(n), f"{n}.tar", size, 0, 0, 0, "", "")) for n, size in enumerate(samples)]
    place = locate(f"/{name}")
    return Dataset(place, Manifest(Shards(shards), "", {}), place)


def made_order(samples: list[int], settings: OrderSettings = SETTINGS) -> Order:
    return Order([made_dataset("made", samples)], settings)


def plans(order: Order, epoch: int) -> list[WindowPlan]:
    return [order.plan(epoch, window, made_index) for window in range(order.windows)]


def keys(plan: WindowPlan) -> list[str]:
    """Of a window in the order of training, what is too long with the row that it is named in."""
    numbers: list[int] = []
    for packs, too_long in zip(plan.rows, plan.too_long, strict=True):
        numbers += [item for items in packs for item in items] + too_long
    return [plan.samples[number].key for number in numbers]


shards = st.lists(st.integers(1, 60), min_size=1, max_size=8)
any_settings = st.builds(
    OrderSettings,
    seed=st.integers(0, 2**70),
    pack_length=st.integers(1, 100),
    packs_per_row=st.integers(1, 4),
    image_positions=st.integers(1, 20),
    run_samples=st.integers(1, 20),
    window_runs=st.integers(1, 5),
)


@settings(max_examples=150, deadline=None)
@given(shards, any_settings, st.integers(0, 10**6))
def test_every_sample_once_an_epoch(samples: list[int], settings: OrderSettings, epoch: int) -> None:
    order = made_order(samples, settings)
    found = Counter(key for plan in plans(order, epoch) for key in keys(plan))
    assert found == Counter(f"{shard}-{n}" for shard, size in enumerate(samples) for n in range(size))


@settings(max_examples=50, deadline=None)
@given(shards, any_settings)
def test_packs_and_rows(samples: list[int], settings: OrderSettings) -> None:
    order = made_order(samples, settings)
    for plan in plans(order, 0):
        size = [place.tokens + place.images * (settings.image_positions - 1) for place in plan.samples]
        assert len(plan.rows) == len(plan.too_long) >= 1
        assert all(len(row) == settings.packs_per_row for row in plan.rows[:-1])
        assert len(plan.rows[-1]) <= settings.packs_per_row
        assert all(sum(size[item] for item in items) <= settings.pack_length for row in plan.rows for items in row)
        assert all(size[item] > settings.pack_length for items in plan.too_long for item in items)
        shares = [len(items) for items in plan.too_long]
        assert max(shares) - min(shares) <= 1  # spread, so that no row alone seems to be all bad


@settings(max_examples=50, deadline=None)
@given(shards, any_settings)
def test_runs_lie_in_their_shards(samples: list[int], settings: OrderSettings) -> None:
    order = made_order(samples, settings)
    runs = [run for window in range(order.windows) for run in order.window(0, window)]
    assert all(0 <= run.start < run.stop <= run.shard.samples for run in runs)
    assert all(run.stop - run.start <= settings.run_samples for run in runs)
    windows = [order.window(0, window) for window in range(order.windows)]
    assert all(len(window) == settings.window_runs for window in windows[:-1])


def test_epochs_and_seeds_differ() -> None:
    order = made_order([50] * 4)
    epochs = [[key for plan in plans(order, epoch) for key in keys(plan)] for epoch in range(5)]
    other = made_order([50] * 4, replace(SETTINGS, seed=6))
    epochs.append([key for plan in plans(other, 0) for key in keys(plan)])
    for n, one in enumerate(epochs):
        for two in epochs[n + 1 :]:
            same = sum(a == b for a, b in zip(one, two, strict=True))
            assert same < 10  # of 200 places; one in expectation


def test_a_plan_depends_on_nothing_but_manifest_and_settings() -> None:
    """Not on the plans made before it, on the process, or on its hash seed."""
    order = made_order([50, 1, 30])
    alone = made_order([50, 1, 30]).plan(3, 2, made_index)
    assert plans(order, 3)[2] == alone
    code = (
        "from tests.data.test_order import *\n"
        "plan = made_order([50, 1, 30]).plan(3, 2, made_index)\n"
        "print(keys(plan), plan.rows)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "platform:.", "PYTHONHASHSEED": "7"},
    )
    assert found.stdout.strip() == f"{keys(alone)} {alone.rows}", found.stderr


def test_a_window_reads_only_its_own_indexes_or_its_groups() -> None:
    order = made_order([20] * 50)
    asked = Counter[str]()

    def index(dataset: Dataset, shard: Shard) -> pa.Table:
        asked[shard.name] += 1
        return made_index(dataset, shard)

    for window, read in ((1, range(1, 2)), (15, range(8, 16))):  # the second is the last of its group
        asked.clear()
        order.plan(0, window, index)
        assert set(asked) == {run.shard.name for number in read for run in order.window(0, number)}
        assert sum(asked.values()) == SETTINGS.window_runs * len(read)


@pytest.mark.parametrize("samples", [[5], [7, 7, 7]])
def test_one_window_datasets(samples: list[int]) -> None:
    assert made_order(samples).windows == 1


def test_a_hundred_million_samples() -> None:
    """Planning a window costs no time that grows with the samples, but for one permutation of the runs."""
    order = made_order([2048] * 48_829, replace(SETTINGS, run_samples=64, window_runs=16, pack_length=2048))
    assert order.windows == 97_658
    plan = order.plan(3, 77_777, made_index)
    assert len(plan.samples) == 1024


def test_of_a_group_one_row_is_cut_short() -> None:
    """What windows have over is packed into whole rows by the last of their group, and by the epoch's last window."""
    order = made_order([300] * 10, replace(SETTINGS, packs_per_row=4, window_runs=20))
    found = plans(order, 0)
    assert len(found) == 22
    short = [number for number, plan in enumerate(found) for row in plan.rows if len(row) < 4]
    assert set(short) <= {7, 15, 21} and len(set(short)) == len(short)
    assert all(place.run < 20 for number in (0, 6, 8, 20) for place in found[number].samples)
    taken = [place for place in found[15].samples if place.run >= 20]
    assert len({place.run // 20 for place in taken}) > 3
    for place in taken:  # from the run of that number of that window
        run = order.window(0, 15 - place.run // 20)[place.run % 20]
        assert run.shard == place.shard and run.start <= place.offset < run.stop


def test_position_after_a_row() -> None:
    assert Position.after((2, 3, 4)) == Position(2, 3, 5)
    assert Position(0, 9, 9) < Position(1, 0, 0)
