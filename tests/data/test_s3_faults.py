"""Reading from an S3 server that fails: tried again, and at last named; no sample is ever left out for it."""

from collections.abc import Iterator

import pytest

from mqwen.data.batch import Batch
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, StorageError, locate
from tests.conftest import KEYS, set_all
from tests.data.digest import digest
from tests.data.making import random_sample, write_dataset
from tests.data.test_rows import read_epoch
from tests.faulty import Faulty


@pytest.fixture
def server(moto: str) -> Iterator[Faulty]:
    with Faulty(moto).serving() as server:
        yield server


@pytest.fixture
def dataset(bucket: Location, processor: MQWenProcessor, server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Location:
    """Thirty samples in the bucket, reached through the server that fails."""
    write_dataset(bucket, processor, [random_sample(seed) for seed in range(30)])
    set_all(monkeypatch, AWS_ENDPOINT_URL=server.url, **KEYS)
    return locate(bucket.uri)


def contents(batches: list[Batch]) -> str:
    assert not any(batch.quarantined for batch in batches)
    return digest([batches])


def test_what_passes_is_tried_again(
    dataset: Location, bucket: Location, processor: MQWenProcessor, server: Faulty
) -> None:
    whole = contents(read_epoch(bucket, processor))
    server.refuse_every = 3
    assert contents(read_epoch(dataset, processor)) == whole
    assert server.refused >= 3
    server.refuse_every, server.cut_every = 0, 3
    assert contents(read_epoch(dataset, processor)) == whole
    assert server.cut >= 3
    server.cut_every, server.slow = 0, 0.1
    assert contents(read_epoch(dataset, processor)) == whole


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["down", "cut_every", "refuse_every"])
def test_what_does_not_pass_is_named(dataset: Location, processor: MQWenProcessor, server: Faulty, fault: str) -> None:
    setattr(server, fault, 1)
    with pytest.raises(StorageError, match=r"s3://bucket/\S+ cannot be read: "):
        read_epoch(dataset, processor)
