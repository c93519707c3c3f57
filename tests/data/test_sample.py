"""Samples as shards store them: read by the webdataset library, and damaged in every way."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from random import Random

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mqwen.data.errors import SampleError
from mqwen.data.manifest import read_index, read_manifest
from mqwen.data.sample import Sample, read_sample, write_sample
from mqwen.model import MQWenProcessor
from tests.data.making import picture, random_sample, write_dataset


def members(sample: Sample) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        write_sample(tar, sample)
        return buffer.getvalue()


MANY = next(seed for seed in range(100) if len(random_sample(seed).pictures) == 3)
SAMPLE = members(random_sample(MANY))


def test_webdataset_reads_what_is_written(tmp_path: Path, processor: MQWenProcessor) -> None:
    samples = [random_sample(seed) for seed in range(40)]
    samples.append(
        Sample("gif", [{"role": "user", "content": "\ud800 half a pair"}], [picture(1, form="GIF", mode="P")])
    )
    samples[-1].messages.append({"role": "assistant", "content": "好"})
    write_dataset(tmp_path, processor, samples)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert len(shards) == 3
    found = {entry["__key__"]: entry for entry in webdataset.WebDataset(shards, shardshuffle=False)}
    assert list(found) == [sample.key for sample in samples]
    for sample in samples:
        entry = found[sample.key]
        assert json.loads(entry["json"]) == {"messages": sample.messages, "source": sample.source}
        names = [name for name in entry if name[0].isdigit()]
        assert [entry[name] for name in sorted(names)] == sample.pictures
        assert {name.split(".")[1] for name in names} <= {"jpg", "png", "gif"}


def test_each_range_of_the_index_is_one_sample(tmp_path: Path, processor: MQWenProcessor) -> None:
    samples = [random_sample(seed) for seed in range(40)]
    dataset = write_dataset(tmp_path, processor, samples)
    found = []
    for shard in read_manifest(dataset).shards:
        data = (tmp_path / f"{shard.name}.tar").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.nbytes, shard.sha256)
        end = 0
        for row in read_index(dataset, shard).to_pylist():
            assert row["offset"] == end  # no byte between two samples
            end += row["nbytes"]
            sample = read_sample(data[row["offset"] : end])
            assert (sample.key, sample.sha256()) == (row["key"], row["sha256"])
            found.append(sample)
        assert set(data[end:]) == {0}
    assert found == samples


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1024,
        b"garbage" * 1000,
        SAMPLE[:100],
        SAMPLE[:700],
        SAMPLE[512:],
    ],
)
def test_no_tar(data: bytes) -> None:
    with pytest.raises(SampleError) as raised:
        read_sample(data)
    assert raised.value.reason == "unreadable"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"messages": 5, "source": ""}',
        b'{"messages": []}',
        b"[" * 100_000,
    ],
)
def test_no_conversation(body: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("x.json")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    with pytest.raises(SampleError):
        read_sample(buffer.getvalue())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_raises_nothing_else(data: st.DataObject) -> None:
    """Random bytes overwritten, cut out or put in: SampleError, or a sample whose hash tells."""
    random = Random(data.draw(st.integers(0, 2**32)))
    damaged = bytearray(SAMPLE)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        # Headers are a small part of the bytes and the most of the logic: half of the damage goes there.
        at = random.randrange(min(512, len(damaged)) if random.random() < 0.5 else len(damaged))
        match random.randrange(4):
            case 0:
                damaged[at] ^= 1 << random.randrange(8)
            case 1:
                damaged[at] = random.randrange(256)
            case 2:
                del damaged[at : at + random.randrange(1, 600)]
                damaged = damaged or bytearray(1)
            case 3:
                damaged[at:at] = random.randbytes(random.randrange(1, 600))
    try:
        sample = read_sample(bytes(damaged))
    except SampleError:
        return
    whole = random_sample(MANY)
    assert sample.sha256() != whole.sha256() or (sample.messages, sample.pictures) == (whole.messages, whole.pictures)


def test_cut_short_anywhere() -> None:
    """A cut inside of a header looks like the end of the tar: the picture that is missing shows in the hash."""
    whole = read_sample(SAMPLE)
    assert len(whole.pictures) > 1
    for length in range(0, len(SAMPLE), 37):
        try:
            sample = read_sample(SAMPLE[:length])
        except SampleError:
            continue
        assert sample.sha256() != whole.sha256() or sample == whole


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from("0123456789xgLKSVNDIX\0"))
def test_valid_headers_of_any_kind(seed: int, kind: str) -> None:
    """A header whose checksum is right, with any type and any size: what a fuzzer of plain bytes rarely reaches."""
    random = Random(seed)
    header = bytearray(SAMPLE[:512])
    header[156] = ord(kind)
    header[124:136] = random.choice((b"%011o\0" % random.randrange(5000), b"\x80" + random.randbytes(11), b"-1\0" * 4))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(SampleError):
        read_sample(bytes(header) + random.randbytes(random.randrange(0, 2048)))
