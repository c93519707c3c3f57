"""Rows against each of their samples encoded alone, whole and with samples that are damaged where they lie."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from mqwen.data.batch import Batch, unpack
from mqwen.data.dataset import open_dataset
from mqwen.data.errors import DataError
from mqwen.data.manifest import read_index, read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.reader import WindowReader
from mqwen.data.row import RowBuilder
from mqwen.data.sample import Sample
from mqwen.model import MQWenProcessor
from mqwen.model.chat import IGNORED, encode_chat
from mqwen.storage import Location, MissingFileError
from tests.data.making import IMAGE_POSITIONS, random_sample, write_dataset

SETTINGS = OrderSettings(
    seed=1, pack_length=150, packs_per_row=3, image_positions=IMAGE_POSITIONS, run_samples=8, window_runs=3
)


def read_epoch(dataset: Location, processor: MQWenProcessor, settings: OrderSettings = SETTINGS) -> list[Batch]:
    reader = WindowReader(Order([open_dataset(dataset)], settings), processor, Position())
    tables = [row for window in range(reader.order.windows) for row in reader.rows(window)]
    return [unpack(table, settings.packs_per_row, processor.image_size) for table in tables]


def alone(processor: MQWenProcessor, sample: Sample) -> tuple[list[int], list[int], list[np.ndarray]]:
    chat = encode_chat(processor.tokenizer, sample.messages)
    return chat.input_ids, chat.labels, [processor.pixels(picture, fast=True) for picture in sample.pictures]


def segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each segment, pack by pack."""
    found = []
    for ids, labels, numbers in zip(*(batch.inputs[n] for n in ("input_ids", "labels", "segment_ids")), strict=True):
        count = int(numbers.max())
        assert numbers[numbers > 0].tolist() == sorted(numbers[numbers > 0].tolist())
        assert set(numbers.tolist()) - {0} == set(range(1, count + 1))
        assert (labels[numbers == 0] == IGNORED).all()
        for number in range(1, count + 1):
            mine = numbers == number
            found.append((ids[mine].tolist(), labels[mine].tolist()))
    return found


@pytest.fixture
def samples() -> dict[str, Sample]:
    return {f"sample-{seed:04d}": random_sample(seed) for seed in range(60)}


@pytest.fixture
def dataset(tmp_path: Path, processor: MQWenProcessor, samples: dict[str, Sample]) -> Location:
    return write_dataset(tmp_path / "data", processor, list(samples.values()))


def test_rows_are_their_samples(dataset: Location, processor: MQWenProcessor, samples: dict[str, Sample]) -> None:
    seen = []
    for batch in read_epoch(dataset, processor):
        parts = [alone(processor, samples[key]) for key in batch.keys]
        assert segments(batch) == [(ids, labels) for ids, labels, _ in parts]
        pictures = [picture for _, _, pictures in parts for picture in pictures]
        assert batch.inputs["pixel_values"].dtype == torch.uint8
        assert batch.inputs["pixel_values"].shape == (len(pictures), 3, 16, 16)
        assert all(np.array_equal(a, b) for a, b in zip(batch.inputs["pixel_values"].numpy(), pictures, strict=True))
        assert batch.inputs["input_ids"].shape[0] == SETTINGS.packs_per_row
        assert all(batch.inputs[name].dtype == torch.int64 for name in ("input_ids", "labels", "segment_ids"))
        places = (batch.inputs["input_ids"] == processor.tokenizer.image_token_id).sum(1)
        lengths = (batch.inputs["segment_ids"] > 0).sum(1) + places * (IMAGE_POSITIONS - 1)
        assert lengths.max() <= SETTINGS.pack_length
        assert (batch.images, batch.positions) == (len(pictures), int(lengths.sum()))
        assert batch.supervised == sum(label != IGNORED for _, labels, _ in parts for label in labels)
        assert batch.quarantined == {}
        seen += batch.keys
    assert sorted(seen) == sorted(samples)


def flip(dataset: Location, key: str, at: int | None = None) -> None:
    """Flips a bit of the sample: in its last picture's bytes, which end where its padding starts, or at an offset."""
    for shard in read_manifest(dataset).shards:
        for row in read_index(dataset, shard).to_pylist():
            if row["key"] == key:
                file = Path(dataset.path) / f"{shard.name}.tar"
                data = bytearray(file.read_bytes())
                end = len(data[row["offset"] : row["offset"] + row["nbytes"]].rstrip(b"\0"))
                data[row["offset"] + (end - 20 if at is None else at)] ^= 4
                file.write_bytes(data)
                return
    raise KeyError(key)


@pytest.mark.parametrize("at", [None, 3, 600])
def test_an_unreadable_sample_is_masked_where_it_stands(
    dataset: Location, processor: MQWenProcessor, samples: dict[str, Sample], at: int | None
) -> None:
    whole = read_epoch(dataset, processor)
    bad = Random(0).sample([key for key, sample in samples.items() if sample.pictures], 4)
    for key in bad:
        flip(dataset, key, at)
    damaged = read_epoch(dataset, processor)
    assert len(damaged) == len(whole)
    found: dict[str, str] = {}
    masked = ([processor.tokenizer.eod_id], [IGNORED])
    for before, after in zip(whole, damaged, strict=True):
        assert after.place == before.place
        assert after.keys == [key for key in before.keys if key not in bad]
        expected = [masked if key in bad else part for key, part in zip(before.keys, segments(before), strict=True)]
        assert segments(after) == expected
        pictures = [picture for key in after.keys for picture in alone(processor, samples[key])[2]]
        assert all(np.array_equal(a, b) for a, b in zip(after.inputs["pixel_values"].numpy(), pictures, strict=True))
        found |= after.quarantined
    assert sorted(found) == sorted(bad)
    assert all(reason.startswith("unreadable: ") for reason in found.values())


def test_a_shard_cut_short_loses_its_end_alone(
    dataset: Location, processor: MQWenProcessor, samples: dict[str, Sample]
) -> None:
    shard = read_manifest(dataset).shards[1]
    rows = read_index(dataset, shard).to_pylist()
    file = Path(dataset.path) / f"{shard.name}.tar"
    file.write_bytes(file.read_bytes()[: rows[5]["offset"] + 700])
    batches = read_epoch(dataset, processor)
    lost = {key for batch in batches for key in batch.quarantined}
    assert lost == {row["key"] for row in rows[5:]}
    assert {key for batch in batches for key in batch.keys} == samples.keys() - lost


def test_what_is_not_the_samples_fault_is_an_error(dataset: Location, processor: MQWenProcessor) -> None:
    """Storage that fails quarantines nothing."""
    shard = read_manifest(dataset).shards[1]
    file = Path(dataset.path) / f"{shard.name}.tar"
    file.unlink()
    with pytest.raises(MissingFileError, match=file.name):
        read_epoch(dataset, processor)


def test_an_index_that_is_not_the_manifests(dataset: Location, processor: MQWenProcessor, tmp_path: Path) -> None:
    index = Path(dataset.path) / "shard-000016.parquet"
    write_dataset(tmp_path / "other", processor, [random_sample(99)])
    for wrong in (index.read_bytes()[:-1], (tmp_path / "other" / "shard-000000.parquet").read_bytes()):
        index.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"{index.name} is damaged, or of another ingest"):
            read_epoch(dataset, processor)


def test_samples_longer_than_a_pack_are_named(
    dataset: Location, processor: MQWenProcessor, samples: dict[str, Sample]
) -> None:
    size = {
        key: len(encode_chat(processor.tokenizer, one.messages).input_ids) + len(one.pictures) * (IMAGE_POSITIONS - 1)
        for key, one in samples.items()
    }
    for most in (sorted(size.values())[40], 5):  # some, and all
        settings = OrderSettings(1, most, 3, IMAGE_POSITIONS, 8, 3)
        batches = read_epoch(dataset, processor, settings)
        found = {key: reason for batch in batches for key, reason in batch.quarantined.items()}
        assert found == {
            key: f"too long: {n} positions, data.pack_length allows {most}" for key, n in size.items() if n > most
        }
        assert {key for batch in batches for key in batch.keys} == samples.keys() - found.keys()
        assert {batch.place[1] for batch in batches} == set(range(3))


def test_a_picture_that_ingest_took_and_training_cannot(tmp_path: Path, processor: MQWenProcessor) -> None:
    """Its bytes are as ingested, so that only decoding can tell."""
    good, bad = random_sample(1), random_sample(5)
    bad.pictures[1] = b"no picture"
    (batch,) = read_epoch(write_dataset(tmp_path, processor, [good, bad]), processor)
    assert batch.keys == [good.key]
    assert batch.quarantined.keys() == {bad.key}
    assert batch.quarantined[bad.key].startswith("picture: 10 bytes are no picture")


def test_a_blank_row(processor: MQWenProcessor) -> None:
    table = RowBuilder(processor, SETTINGS).build([], [], Position(), Position())
    batch = unpack(table, SETTINGS.packs_per_row, processor.image_size)
    assert {name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} == {
        "input_ids": (3, 1),
        "labels": (3, 1),
        "segment_ids": (3, 1),
        "pixel_values": (0, 3, 16, 16),
    }
    assert (batch.inputs["labels"] == IGNORED).all() and (batch.inputs["segment_ids"] == 0).all()
    assert (batch.supervised, batch.positions, batch.images, batch.keys) == (0, 0, 0, [])


def test_cut_and_missing_shards_are_named(tmp_path: Path, processor: MQWenProcessor) -> None:
    dataset = write_dataset(tmp_path, processor, [random_sample(seed) for seed in range(4)], shard_samples=2)
    opened = open_dataset(dataset)
    manifest = opened.manifest
    opened.check_shards()
    shard = tmp_path / f"{manifest.shards[1].name}.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DataError, match=rf"{shard.name} has 700 bytes, {manifest.shards[1].nbytes} were written"):
        opened.check_shards()
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is missing; copy the dataset again"):
        opened.check_shards()
