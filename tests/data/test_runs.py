"""What is read of a run of neighbours, of which not all may be wanted."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from mqwen.data import runs
from mqwen.data.dataset import Dataset, open_dataset
from mqwen.data.errors import SampleError
from mqwen.data.manifest import read_index
from mqwen.data.order import Place
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample
from mqwen.model import MQWenProcessor
from mqwen.storage import Location
from tests.data.making import random_sample, write_dataset

SAMPLES = [random_sample(seed) for seed in range(8)]


@pytest.fixture
def dataset(tmp_path: Path, processor: MQWenProcessor) -> Dataset:
    """Of one shard."""
    return open_dataset(write_dataset(tmp_path, processor, SAMPLES))


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First byte and end of each read of a part of a file."""
    read, found = Location.read_range, list[tuple[int, int]]()
    monkeypatch.setattr(
        Location, "read_range", lambda file, at, size: found.append((at, at + size)) or read(file, at, size)
    )
    return found


def places_of(dataset: Dataset, wanted: Sequence[int]) -> list[Place]:
    (shard,) = dataset.manifest.shards
    rows = read_index(dataset.location, shard).to_pylist()
    return [Place(shard=shard, run=0, **rows[number]) for number in wanted]


def read_all(dataset: Dataset, places: list[Place]) -> list[Sample | SampleError]:
    samples = Samples([dataset], places)
    return [samples.read(place) for place in places]


def test_a_run_is_one_read_when_the_first_of_it_is_asked_for(dataset: Dataset, ranges: list[tuple[int, int]]) -> None:
    places = places_of(dataset, [5, 0, 3])
    samples = Samples([dataset], places)
    assert ranges == []
    assert samples.read(places[0]) == SAMPLES[5]
    once = [(places[1].offset, places[0].offset + places[0].nbytes)]
    assert ranges == once
    assert [samples.read(place) for place in places[1:]] == [SAMPLES[0], SAMPLES[3]]
    assert ranges == once


def test_what_lies_far_between_is_not_read(
    dataset: Dataset, ranges: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, far = places = places_of(dataset, [0, 1, 7])
    gap = far.offset - second.offset - second.nbytes
    for widest, stretches in ((gap, [(first, far)]), (gap - 1, [(first, second), (far, far)])):
        monkeypatch.setattr(runs, "WIDEST_GAP", widest)
        ranges.clear()
        assert read_all(dataset, places) == [SAMPLES[0], SAMPLES[1], SAMPLES[7]]
        assert ranges == [(a.offset, b.offset + b.nbytes) for a, b in stretches]


def test_of_a_shard_that_was_cut_short_the_stretches_before_the_cut_are_read(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WIDEST_GAP", 0)
    places = places_of(dataset, [0, 3, 7])
    file = dataset.location / "shard-000000.tar"
    file.write_bytes(file.read_bytes()[: places[2].offset + 100])
    first, second, cut = read_all(dataset, places)
    assert [first, second] == [SAMPLES[0], SAMPLES[3]]
    assert isinstance(cut, SampleError)
    assert cut.reason == "unreadable"
