"""Ingest on Ray: what it writes is read by an independent reader, and bad input commits nothing."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from mqwen.data.batch import unpack
from mqwen.data.dataset import open_dataset
from mqwen.data.encode import encode
from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.data.filters import Filters
from mqwen.data.ingest import REJECTED, Ingest, IngestSettings
from mqwen.data.manifest import MANIFEST, read_index, read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.reader import WindowReader
from mqwen.data.sample import read_sample
from mqwen.data.sources.digits import DigitsSource
from mqwen.data.sources.llava import LlavaSource
from mqwen.data.sources.stored import ParquetSource, WebDatasetSource
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, StorageError, locate
from tests.data.making import IMAGE_POSITIONS, WORDS, picture
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
    bad = len(BAD)

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
    assert [entry["key"] for entry in listed if entry["reason"] != "duplicate"] == list(expected)[:-1]
    assert all(entry["detail"] for entry in listed)

    run(source, dataset, processor, max_rejected=0.95, shard_samples=4)  # into the folder that is no dataset yet
    manifest = read_manifest(dataset)
    assert manifest.samples == 5
    assert sum(manifest.rejected.values()) == bad + 1
    assert manifest.rejected["missing picture"] == 6
    keys = [row["key"] for shard in manifest.shards for row in read_index(dataset, shard).to_pylist()]
    assert keys == [f"good{n}" for n in range(5)]

    file.write_text(json.dumps(records[:3]))
    with pytest.raises(EmptyDatasetError, match="no sample of the source can be used"):
        run(source, locate(tmp_path / "none"), processor, max_rejected=1.0)
    assert not (tmp_path / "none" / MANIFEST).exists()


def pairs(count: int) -> list[dict[str, Any]]:
    """Records about pictures n.png, which differ in their answers."""
    return [
        {"id": f"{n:02}", "image": f"{n}.png", "conversations": [human("<image>?"), gpt(f"{n}")]} for n in range(count)
    ]


def llava_of(folder: Path, records: list[dict[str, Any]], size: tuple[int, int] = (40, 30)) -> LlavaSource:
    folder.mkdir(exist_ok=True)
    for record in records:
        if not (folder / record["image"]).exists():
            (folder / record["image"]).write_bytes(picture(int(record["id"]), size))
    (folder / "records.json").write_text(json.dumps(records))
    return LlavaSource(locate(folder / "records.json"), locate(folder))


def keys_of(dataset: Location) -> list[str]:
    return [row["key"] for shard in read_manifest(dataset).shards for row in read_index(dataset, shard).to_pylist()]


@pytest.mark.usefixtures("cluster")
def test_duplicates_by_what_is_asked_for(tmp_path: Path, processor: MQWenProcessor) -> None:
    """Over all chunks; the first is kept, and the report counts the others."""
    records = pairs(6)
    records[2]["conversations"] = records[0]["conversations"]  # its text alone
    records[3]["image"] = records[1]["image"]  # its picture alone
    records[5] = {**records[4], "id": "05"}  # all of it, in the next chunk
    source = llava_of(tmp_path / "photos", records)
    for kinds, dropped in (
        ((), set()),
        (("sample",), {"05"}),
        (("text",), {"02", "05"}),
        (("picture",), {"03", "05"}),
        (("picture", "text"), {"02", "03", "05"}),
    ):
        dataset = locate(tmp_path / "-".join(("data", *kinds)))
        run(source, dataset, processor, shard_samples=5, deduplicate=kinds)
        assert keys_of(dataset) == [f"{n:02}" for n in range(6) if f"{n:02}" not in dropped]
        assert read_manifest(dataset).rejected == ({"duplicate": len(dropped)} if dropped else {})
        listed = [json.loads(line) for line in (dataset / REJECTED).read_bytes().splitlines()]
        assert {entry["key"] for entry in listed} == dropped


@pytest.mark.usefixtures("cluster")
def test_filters_smaller_pictures_and_the_report(tmp_path: Path, processor: MQWenProcessor) -> None:
    records = pairs(5)
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(100, 80), (300, 200), (60, 15), (300, 20), (200, 300)]
    for n, size in enumerate(sizes):
        (folder / f"{n}.png").write_bytes(picture(n, size))
    dataset = locate(tmp_path / "data")
    run(llava_of(folder, records), dataset, processor, filters=Filters(min_side=20, max_aspect=4, max_side=120))
    assert read_manifest(dataset).rejected == {"narrow picture": 1, "small picture": 1}
    assert keys_of(dataset) == ["00", "01", "04"]
    (tar,) = (tmp_path / "data").glob("*.tar")
    entries = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert entries[0]["0.png"] == (folder / "0.png").read_bytes()
    for entry, n in zip(entries[1:], (1, 4), strict=True):
        small, large = Image.open(io.BytesIO(entry["0.jpg"])), Image.open(folder / f"{n}.png")
        assert small.size == tuple(side * 120 // 300 for side in large.size)
        a, b = (np.asarray(image.resize((24, 16)), np.float32) for image in (small, large))
        assert np.abs(a - b).mean() < 6  # of 255 levels

    found = json.loads((dataset / "statistics.json").read_bytes())
    assert found["totals"]["samples"] == found["totals"]["images"] == 3
    assert found["totals"]["tokens"] == read_manifest(dataset).shards.total("tokens")
    assert found["rejected"] == {"narrow picture": 1, "small picture": 1}
    assert found["distributions"]["longer side, pixels"] == {"128": 1, "512": 2}  # as they came
    assert found["distributions"]["pictures a sample"] == {"1": 3}
    page = (dataset / "report.html").read_bytes().decode()
    assert page.count("<img") == 3
    assert all(f"<b>assistant</b> {n}" in page for n in (0, 1, 4))


@pytest.mark.usefixtures("cluster")
def test_an_ingest_that_was_stopped_goes_on(tmp_path: Path, processor: MQWenProcessor) -> None:
    """Its parts are not made again: the pictures of those that are there can even be gone."""
    folder = tmp_path / "photos"
    source = llava_of(folder, pairs(9))
    run(source, locate(tmp_path / "whole"), processor, shard_samples=2)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise StoppedError

    dataset = locate(tmp_path / "data")
    settings = IngestSettings(shard_samples=2)
    with pytest.raises(StoppedError):
        Ingest.prepare(source, dataset, processor, settings).run(stop)
    assert not (dataset / MANIFEST).exists()
    made = {int(name[5:11]) for name in (dataset / "parts").names() if name.startswith("part-")}
    assert len(made) >= 3
    for number in made:
        for n in range(number * 2, min(number * 2 + 2, 9)):
            (folder / f"{n}.png").unlink()
    with pytest.raises(DataError, match="holds another ingest that was stopped"):
        run(source, dataset, processor, shard_samples=3)
    run(source, dataset, processor, shard_samples=2)
    whole, again = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "data"))
    assert whole.pop("report.html").replace(b"whole", b"data") == again.pop("report.html")
    assert whole == again


def test_another_source_does_not_go_on_with_an_ingest(tmp_path: Path, processor: MQWenProcessor) -> None:
    """Though its chunks are called the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.tar").touch()
        (folder / "a.jsonl").write_text("[{}]")
    kinds: list[list[Any]] = [
        [DigitsSource(4), DigitsSource(4, seed=1), DigitsSource(4, split="heldout")],
        [WebDatasetSource(locate(one)), WebDatasetSource(locate(other)), WebDatasetSource(locate(one), "What?")],
        [LlavaSource(locate(one / "a.jsonl"), locate(one)), LlavaSource(locate(one / "a.jsonl"), locate(other))],
    ]
    for number, (first, *others) in enumerate(kinds):
        dataset = locate(tmp_path / f"data-{number}")
        for _ in range(2):
            Ingest.prepare(first, dataset, processor, IngestSettings())._begin()
        for source in others:
            with pytest.raises(DataError, match="holds another ingest that was stopped"):
                Ingest.prepare(source, dataset, processor, IngestSettings())._begin()


@pytest.mark.usefixtures("cluster")
def test_what_was_mended_is_ingested_again(tmp_path: Path, processor: MQWenProcessor) -> None:
    records = pairs(4)
    source, dataset = llava_of(tmp_path / "photos", records), locate(tmp_path / "data")
    (tmp_path / "photos" / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 4 samples are bad"):
        run(source, dataset, processor, shard_samples=1)
    (tmp_path / "photos" / "2.png").write_bytes(picture(2))
    run(source, dataset, processor, shard_samples=1)
    assert keys_of(dataset) == ["00", "01", "02", "03"]


@pytest.mark.usefixtures("cluster")
def test_shards_end_by_bytes_too(tmp_path: Path, processor: MQWenProcessor) -> None:
    source = llava_of(tmp_path / "photos", pairs(7))
    run(source, locate(tmp_path / "data"), processor, shard_samples=5, shard_bytes=4096)
    shards = read_manifest(locate(tmp_path / "data")).shards
    assert keys_of(locate(tmp_path / "data")) == [f"{n:02}" for n in range(7)]
    assert [shard.name for shard in shards][:3] == ["shard-000000", "shard-000000-1", "shard-000000-2"]
    assert all(4096 <= shard.nbytes < 12_000 for shard in shards[:2])


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_files_indexed_where_they_lie(tmp_path: Path, processor: MQWenProcessor, form: str) -> None:
    """Nothing is written beside them, and training reads the same samples as of shards that are written anew."""
    there = tmp_path / "there"
    there.mkdir()
    captions = [f"which {WORDS[n % len(WORDS)]} {n}" for n in range(20)]
    for half in (0, 1):
        numbers = range(half * 10, half * 10 + 10)
        if form == "tar":
            with webdataset.TarWriter(str(there / f"{half}.tar")) as sink:
                for n in numbers:
                    sink.write({"__key__": f"{n:04}", "png": picture(n), "txt": captions[n]})
        else:
            images = [{"bytes": picture(n), "path": ""} for n in numbers]
            table = pa.table({"image": images, "caption": captions[half * 10 : half * 10 + 10]})
            pq.write_table(table, there / f"{half}.parquet", row_group_size=4)
    before = {file.name: file.read_bytes() for file in there.iterdir()}
    kind = WebDatasetSource if form == "tar" else ParquetSource
    source, found = kind(locate(there), "What?"), {}
    for name in ("in place", "written"):
        dataset = locate(tmp_path / name)
        ingest = Ingest.prepare(source, dataset, processor, IngestSettings(), in_place=name == "in place")
        manifest = ingest.run()
        opened = open_dataset(dataset)
        opened.check_shards()
        for shard in manifest.shards:
            assert shard.sha256 == hashlib.sha256((Path(opened.files.path) / shard.file).read_bytes()).hexdigest()
        order = Order([opened], OrderSettings(3, 60, 2, IMAGE_POSITIONS, run_samples=3, window_runs=2))
        reader = WindowReader(order, processor, Position())
        rows = [unpack(table, 2, 16) for window in range(order.windows) for table in reader.rows(window)]
        assert all(not row.quarantined for row in rows)
        tensors = [(name, row.inputs[name].numpy().tobytes()) for row in rows for name in sorted(row.inputs)]
        found[name] = tensors, sorted(Path(key).stem[-4:] for row in rows for key in row.keys)
    assert len(found["written"][1]) == 20
    assert found["in place"][0] == found["written"][0]
    assert {file.name: file.read_bytes() for file in there.iterdir()} == before
    assert not list((tmp_path / "in place").glob("*.tar"))

    (there / f"1.{form}").write_bytes(before[f"1.{form}"][: len(before[f"1.{form}"]) // 2])
    with pytest.raises(DataError, match=rf"1\.{form} has \d+ bytes, \d+ were written"):
        open_dataset(locate(tmp_path / "in place")).check_shards()
    for n in range(5):  # a cut file costs its samples, no other ones
        order = Order([open_dataset(locate(tmp_path / "in place"))], OrderSettings(n, 60, 2, IMAGE_POSITIONS, 3, 2))
        reader = WindowReader(order, processor, Position())
        rows = [unpack(table, 2, 16) for window in range(order.windows) for table in reader.rows(window)]
        lost = {key for row in rows for key in row.quarantined}
        assert lost and {key.partition("/")[0] for key in lost} == {"1"}
        assert {why.partition(":")[0] for row in rows for why in row.quarantined.values()} == {"unreadable"}
        assert len(lost) + sum(len(row.keys) for row in rows) == 20


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (DigitsSource(3), {}, "--in-place goes with webdataset and parquet"),
        (
            WebDatasetSource(locate("/nowhere")),
            {"filters": Filters(max_side=100)},
            "--settings.filters.max-side does not",
        ),
    ],
)
def test_what_cannot_be_in_place(
    tmp_path: Path, processor: MQWenProcessor, source: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Ingest.prepare(source, locate(tmp_path), processor, IngestSettings(**settings), in_place=True)


@pytest.mark.usefixtures("cluster")
def test_storage_that_fails_is_named(tmp_path: Path, processor: MQWenProcessor) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"^\S*/file/data/\S+ cannot be written: "):
        run(DigitsSource(3), locate(tmp_path / "file" / "data"), processor)


@pytest.mark.parametrize(
    ("pictures_drawn", "settings", "message"),
    [
        (0, {}, "the source holds no samples"),
        (3, {"shard_samples": 0}, "--settings.shard-samples is 0; at least 1 is needed"),
        (3, {"shard_bytes": 0}, "--settings.shard-bytes is 0; at least 1 is needed"),
        (3, {"filters": Filters(min_side=0)}, "--settings.filters.min-side is 0; at least 1"),
        (3, {"filters": Filters(max_aspect=0.5)}, "--settings.filters.max-aspect is 0.5; at least 1"),
        (3, {"filters": Filters(max_side=-1)}, "--settings.filters.max-side is -1; 0 for none"),
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
    [b"", b"[]", b"{}", b"\xff", b'{"format_version": 2}', b'{"format_version": 2, "shards": [{}]}', b"[" * 9999],
)
def test_a_manifest_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json is damaged \(.*ingest the dataset again"):
        read_manifest(locate(tmp_path))


def test_a_manifest_of_another_version_or_without_samples(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 3, "new": "field"}))
    with pytest.raises(DataError, match="has format version 3, this code reads 2"):
        read_manifest(locate(tmp_path))
    (tmp_path / MANIFEST).write_text(
        json.dumps({"format_version": 2, "shards": [], "tokenizer": "", "rejected": {"picture": 3}})
    )
    with pytest.raises(EmptyDatasetError, match=r"holds no samples; rejected when it was ingested: \{'picture': 3\}"):
        read_manifest(locate(tmp_path))
