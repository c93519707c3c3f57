"""Ingest on Ray: what it writes is read by an independent reader, and bad input commits nothing."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from mqwen.data.encode import encode
from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.data.ingest import REJECTED, Ingest, IngestSettings
from mqwen.data.manifest import MANIFEST, read_index, read_manifest
from mqwen.data.sample import read_sample
from mqwen.data.sources.digits import DigitsSource
from mqwen.data.sources.llava import LlavaSource
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, StorageError, locate
from tests.data.making import picture
from tests.data.test_llava import BAD, gpt, human, pictures  # noqa: F401 (a fixture)

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"  # beside the checkout, where there are some


def animated_gif() -> bytes:
    frames = [Image.open(io.BytesIO(picture(n))).convert("P") for n in range(3)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn right
    return picture(5, (60, 20), "JPEG", exif=exif)


KINDS = {
    "plain.jpg": picture(1, (640, 480), "JPEG"),
    "grey.jpg": picture(2, form="JPEG", mode="L"),
    "cmyk.jpg": picture(3, form="JPEG", mode="CMYK"),
    "rotated.jpg": rotated_jpeg(),
    "plain.png": picture(4),
    "alpha.png": picture(6, mode="RGBA"),
    "palette.png": picture(7, mode="P"),
    "deep.png": picture(8, mode="I;16"),
    "bits.png": picture(9, mode="1"),
    "pixel.png": picture(10, (1, 1)),
    "animated.gif": animated_gif(),
    "web.webp": picture(11, form="WEBP"),
    "old.bmp": picture(12, form="BMP"),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> LlavaSource:
    """A record for each kind of picture, and for text only, several pictures and several turns."""
    folder = tmp_path_factory.mktemp("llava")
    names = list(KINDS)
    for name, content in KINDS.items():
        (folder / name).write_bytes(content)
    if PHOTOS.is_dir():
        for file in sorted([*PHOTOS.glob("*.jpg"), *PHOTOS.glob("*.png")]):
            (folder / file.name).write_bytes(file.read_bytes())
            names.append(file.name)
    records: list[dict[str, Any]] = [
        {"id": name, "image": name, "conversations": [human("<image>\nWhat is it? 这是什么?"), gpt(f"It is {name}.")]}
        for name in names
    ]
    records.append({"id": "text", "conversations": [human("你好"), gpt("Hello."), human("Bye."), gpt("再见。")]})
    records.append({"id": "many", "image": names[:4], "conversations": [human("<image>" * 4), gpt("Four.")]})
    records.append({"id": "odd \ud800", "conversations": [human("half a pair: \ud83d"), gpt("control \0 <|im_end|>")]})
    (folder / "conversations.json").write_text(json.dumps(records))
    return LlavaSource(locate(folder / "conversations.json"), locate(folder))


def run(source: Any, dataset: Location, processor: MQWenProcessor, **settings: Any) -> list[int]:
    done: list[int] = []
    Ingest.prepare(source, dataset, processor, IngestSettings(**settings)).run(lambda n, of: done.append(n))
    return done


@pytest.mark.usefixtures("cluster")
def test_what_ingest_writes(tmp_path: Path, llava: LlavaSource, processor: MQWenProcessor) -> None:
    records = json.loads(llava.conversations.read_bytes())
    done = run(llava, locate(tmp_path / "one"), processor, shard_samples=7)
    assert done == list(range(1, -(-len(records) // 7) + 1))
    dataset = locate(tmp_path / "one")
    manifest = read_manifest(dataset)
    assert manifest.samples == len(records)
    assert [shard.samples for shard in manifest.shards[:-1]] == [7] * (len(manifest.shards) - 1)
    assert (manifest.tokenizer, manifest.rejected) == (processor.tokenizer.fingerprint, {})
    assert (dataset / REJECTED).read_bytes() == b""

    tars = [str(tmp_path / "one" / f"{shard.name}.tar") for shard in manifest.shards]
    entries = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(entries) == len(records)
    for entry, record in zip(entries, records, strict=True):
        body = json.loads(entry["json"])
        assert body["source"] == record["id"]
        assert [m["role"] for m in body["messages"]] == [
            {"human": "user", "gpt": "assistant"}[turn["from"]] for turn in record["conversations"]
        ]
        names = record.get("image", [])
        files = [
            (Path(llava.pictures.path) / name).read_bytes() for name in ([names] if isinstance(names, str) else names)
        ]
        assert [entry[name] for name in sorted(n for n in entry if n[0].isdigit())] == files

    keys = []
    for shard, tar in zip(manifest.shards, tars, strict=True):
        data = Path(tar).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.nbytes, shard.sha256)
        rows = read_index(dataset, shard).to_pylist()
        assert (shard.tokens, shard.images) == tuple(sum(row[name] for row in rows) for name in ("tokens", "images"))
        end = 0
        for row in rows:
            assert row["offset"] == end
            end += row["nbytes"]
            sample = read_sample(data[row["offset"] : end])
            chat, images = encode(processor, sample)
            assert (row["key"], row["sha256"]) == (sample.key, sample.sha256())
            assert (row["tokens"], row["images"]) == (len(chat.input_ids), len(images))
            keys.append(row["key"])
        assert set(data[end:]) == {0}
    assert keys == [entry["__key__"] for entry in entries]
    assert len(set(keys)) == len(keys)

    run(llava, locate(tmp_path / "two"), processor, shard_samples=7)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }
    with pytest.raises(DataError, match="is a dataset already; choose another folder or delete it"):
        run(llava, dataset, processor)


@pytest.mark.usefixtures("cluster")
def test_bad_records_are_listed(tmp_path: Path, pictures: Path, processor: MQWenProcessor) -> None:  # noqa: F811
    records = [{"id": f"bad{n}"} | record for n, (record, _, _) in enumerate(BAD)]
    good = [{"id": f"good{n}", "conversations": [human("Hi"), gpt(f"{n}")]} for n in range(5)]
    records[3:3] = good
    records.append(good[2])
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps(records))
    source, dataset = LlavaSource(locate(file), locate(pictures)), locate(tmp_path / "data")
    bad = len(BAD) + 1

    with pytest.raises(
        DataError, match=rf"{bad} of {len(records)} samples are bad \(3 for picture, .*first is bad0: "
    ) as raised:
        run(source, dataset, processor, max_rejected=0.5, shard_samples=4)
    assert "allows a share of 0.5. The first is bad0: 26 bytes are no picture" in str(raised.value)
    assert str(dataset / REJECTED) in str(raised.value)
    assert not (dataset / MANIFEST).exists()
    with pytest.raises(DataError, match=r"is no dataset: it has no manifest\.json"):
        read_manifest(dataset)
    listed = [json.loads(line) for line in (dataset / REJECTED).read_bytes().decode().splitlines()]
    expected = {f"bad{n}": reason for n, (_, reason, _) in enumerate(BAD)} | {"good2-2": "duplicate"}
    assert {entry["key"]: entry["reason"] for entry in listed} == expected
    assert [entry["key"] for entry in listed] == list(expected)
    assert all(entry["detail"] for entry in listed)

    run(source, dataset, processor, max_rejected=0.95, shard_samples=4)  # into the folder that is no dataset yet
    manifest = read_manifest(dataset)
    assert manifest.samples == 5
    assert sum(manifest.rejected.values()) == bad
    assert manifest.rejected["missing picture"] == 6
    keys = [row["key"] for shard in manifest.shards for row in read_index(dataset, shard).to_pylist()]
    assert keys == [f"good{n}" for n in range(5)]

    file.write_text(json.dumps(records[:3]))
    with pytest.raises(EmptyDatasetError, match="no sample of the source can be used"):
        run(source, locate(tmp_path / "none"), processor, max_rejected=1.0)
    assert not (tmp_path / "none" / MANIFEST).exists()


@pytest.mark.usefixtures("cluster")
def test_storage_that_fails_is_named(tmp_path: Path, processor: MQWenProcessor) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"^\S*/file/data/shard-000000\.tar cannot be written: "):
        run(DigitsSource(3), locate(tmp_path / "file" / "data"), processor)


@pytest.mark.parametrize(
    ("pictures_drawn", "settings", "message"),
    [
        (0, {}, "the source holds no samples"),
        (3, {"shard_samples": 0}, "--settings.shard-samples is 0; at least 1 is needed"),
        (3, {"max_rejected": 1.5}, "--settings.max-rejected is 1.5; a share from 0 to 1"),
        (3, {"max_rejected": float("nan")}, "--settings.max-rejected is nan"),
    ],
)
def test_what_is_refused_before_a_task_runs(
    tmp_path: Path, processor: MQWenProcessor, pictures_drawn: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Ingest.prepare(DigitsSource(pictures_drawn), locate(tmp_path), processor, IngestSettings(**settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"format_version": 1}', b'{"format_version": 1, "shards": [{}]}', b"[" * 9999],
)
def test_a_manifest_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json is damaged \(.*ingest the dataset again"):
        read_manifest(locate(tmp_path))


def test_a_manifest_of_another_version_or_without_samples(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 2, "new": "field"}))
    with pytest.raises(DataError, match="has format version 2, this code reads 1"):
        read_manifest(locate(tmp_path))
    (tmp_path / MANIFEST).write_text(
        json.dumps({"format_version": 1, "shards": [], "tokenizer": "", "rejected": {"picture": 3}})
    )
    with pytest.raises(EmptyDatasetError, match=r"holds no samples; rejected when it was ingested: \{'picture': 3\}"):
        read_manifest(locate(tmp_path))
