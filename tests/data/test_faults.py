"""FAULTS.md: each line of its table is made, ingested and trained on, and ends as the table says."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mqwen.data
from mqwen.data.batch import Batch
from mqwen.data.conversation import from_llava
from mqwen.data.dataset import Dataset
from mqwen.data.errors import SampleError
from mqwen.data.filters import Filters
from mqwen.data.manifest import Manifest, Shard, Shards, read_index, read_manifest
from mqwen.data.order import Place
from mqwen.data.parts import Part, PartWriter
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample, read_sample, write_sample
from mqwen.data.sources.files import read_picture
from mqwen.data.sources.stored import ParquetSource, WebDatasetSource
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, locate
from tests.data.making import picture, random_sample, write_dataset
from tests.data.test_ingest import animated_gif, rotated_jpeg
from tests.data.test_rows import flip, read_epoch

TABLE = Path(mqwen.data.__file__).parent / "FAULTS.md"
GOOD = [random_sample(seed) for seed in range(1, 7)]
WITH_PICTURES = next(sample.key for sample in GOOD if sample.pictures)


def rows() -> dict[str, tuple[str, str]]:
    """What the table says of each kind of sample: the outcomes at ingest and in training."""
    lines = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0].strip(): (cells[1].strip(), cells[2].strip()) for cells in lines[1:]}


def asked(*pictures: bytes) -> Sample:
    """A question about pictures, with an answer."""
    question = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "which"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "three"}]
    return Sample("bad", turns, list(pictures))


def said(*messages: dict[str, Any]) -> Sample:
    return Sample("bad", list(messages))


def bits(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def float_picture() -> bytes:
    out = io.BytesIO()
    Image.new("F", (8, 8)).save(out, "TIFF")
    return out.getvalue()


def stored_text(body: bytes) -> Sample:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("bad.json")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    return read_sample(buffer.getvalue())


def parquet_file(folder: Path, column: pa.Array, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), folder / "rows.parquet")


def not_utf8() -> pa.Array:
    """A column of strings that says of its bytes what they are not."""
    return pa.Array.from_buffers(pa.string(), 1, pa.array([b"th\xffree"]).buffers())


USER, ANSWER = {"role": "user", "content": "which"}, {"role": "assistant", "content": "three"}
SMALL = Filters(min_side=20, max_aspect=3)
SAMPLES: dict[str, Callable[[], Sample]] = {
    "missing picture": lambda: Sample("bad", [USER, ANSWER], [read_picture(locate("/nowhere"), "gone.png")]),
    "path outside of the folder": lambda: Sample("bad", [USER, ANSWER], [read_picture(locate("/nowhere"), "../x")]),
    "garbage picture": lambda: asked(b"<html>404 Not Found</html>"),
    "cut picture": lambda: asked(picture(3, (300, 300), form="JPEG")[:900]),
    "decompression bomb": lambda: asked(bits(10_000, 10_000)),
    "very narrow picture": lambda: asked(bits(2010, 10)),
    "float picture": lambda: asked(float_picture()),
    "1 x 1 picture": lambda: asked(picture(1, (1, 1))),
    "CMYK picture": lambda: asked(picture(1, form="JPEG", mode="CMYK")),
    "palette picture": lambda: asked(picture(1, mode="P")),
    "transparent picture": lambda: asked(picture(1, mode="RGBA")),
    "16-bit picture": lambda: asked(picture(1, mode="I;16")),
    "animated picture": lambda: asked(animated_gif()),
    "EXIF-rotated picture": lambda: asked(rotated_jpeg()),
    "picture smaller than --settings.filters.min-side": lambda: asked(picture(1, (30, 19))),
    "picture narrower than --settings.filters.max-aspect": lambda: asked(picture(1, (100, 30))),
    "equal sample": lambda: replace(GOOD[0], key="bad"),
    "conversation without an answer": lambda: said(USER),
    "conversation of no known form": lambda: said({"role": "robot", "content": "which"}, ANSWER),
    "pictures that do not fit the text": lambda: replace(asked(picture(1)), pictures=[picture(1)] * 2),
    "conversation longer than the context": lambda: said({"role": "user", "content": "which " * 400}, ANSWER),
}


class Given:
    """A source that has these samples, by key."""

    def __init__(self, samples: dict[str, Callable[[], Sample]]) -> None:
        self.samples = samples

    def chunks(self, size: int) -> list[int]:
        return [0]

    def read(self, chunk: int) -> Any:
        for key, make in self.samples.items():
            try:
                yield key, make()
            except SampleError as error:
                yield key, error


def ingested(processor: MQWenProcessor, folder: Path, source: Any, filters: Filters, in_place: bool = False) -> Part:
    writer = PartWriter(source, in_place, locate(folder), processor, filters, 100, 1 << 30)
    return writer._make("shard-000000", source.chunks(100)[0])


def outcomes(part: Part) -> dict[str, str]:
    return {row["key"]: row["reason"] or "kept" for row in part.rows.to_pylist()}


def reasons(batches: list[Batch]) -> dict[str, str]:
    kept = {key: "kept" for batch in batches for key in batch.keys}
    return kept | {key: why.partition(":")[0] for batch in batches for key, why in batch.quarantined.items()}


def test_every_line_is_tested() -> None:
    assert rows().keys() == SAMPLES.keys() | {
        "truncated tar",
        "flipped byte",
        "invalid UTF-8",
        "JSON that is none",
        "field of another kind",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_lines_at_ingest(tmp_path: Path, processor: MQWenProcessor) -> None:
    by_filters = {SMALL: {name for name in SAMPLES if "filters" in name}}
    by_filters[Filters()] = SAMPLES.keys() - by_filters[SMALL]
    found: dict[str, str] = {}
    for filters, names in by_filters.items():
        samples = {name: SAMPLES[name] for name in names} | {one.key: lambda one=one: one for one in GOOD}
        part = ingested(processor, tmp_path, Given(samples), filters)  # type: ignore[arg-type]
        found |= outcomes(part)
        same = [row["sample"] for row in part.rows.to_pylist() if row["key"] in ("equal sample", GOOD[0].key)]
        assert len(set(same)) == 1  # found when all parts are there: see test_ingest.py
    found["equal sample"] = "duplicate"
    assert found == {name: rows()[name][0] for name in SAMPLES} | {one.key: "kept" for one in GOOD}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_lines_in_training(tmp_path: Path, processor: MQWenProcessor) -> None:
    table = {name: outcome for name, (_, outcome) in rows().items() if name in SAMPLES}
    expected = {name: outcome for name, outcome in table.items() if outcome != "-"}
    key = {name: f"bad-{number}" for number, name in enumerate(expected)}
    samples = [replace(SAMPLES[name](), key=key[name]) for name in expected]
    found = reasons(read_epoch(write_dataset(tmp_path, processor, [*GOOD, *samples], 100), processor))
    assert {name: found[key[name]] for name in expected} == expected
    assert {found[one.key] for one in GOOD} == {"kept"}


def cut(dataset: Location) -> str:
    """Cuts the dataset's tar inside of its last sample, whose key it returns."""
    (shard,) = read_manifest(dataset).shards
    *_, last = read_index(dataset, shard).to_pylist()
    file = Path(dataset.path) / shard.file
    file.write_bytes(file.read_bytes()[: last["offset"] + 700])
    return last["key"]


def test_a_truncated_tar(tmp_path: Path, processor: MQWenProcessor) -> None:
    at_ingest, in_training = rows()["truncated tar"]
    dataset = write_dataset(tmp_path, processor, GOOD)
    lost = cut(dataset)
    assert reasons(read_epoch(dataset, processor)) == {one.key: "kept" for one in GOOD} | {lost: in_training}
    found = outcomes(ingested(processor, tmp_path / "made", WebDatasetSource(dataset), Filters(), in_place=True))
    assert found == {f"shard-000000/{one.key}": "kept" for one in GOOD[:-1]} | {"shard-000000.tar": at_ingest}


def test_a_file_of_elsewhere_comes_once(tmp_path: Path, processor: MQWenProcessor) -> None:
    """To be scanned and hashed."""
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "files" / "a.tar", "w") as tar:
        for sample in GOOD:
            write_sample(tar, sample)
    remote = fsspec.filesystem("dir", path=str(tmp_path / "files"))
    opened, opener = list[str](), remote.open
    remote.open = lambda path, *words, **named: opened.append(path) or opener(path, *words, **named)
    files = Location(pafs.PyFileSystem(pafs.FSSpecHandler(remote)), "", "dir://files")
    part = ingested(processor, tmp_path, WebDatasetSource(files), Filters(), in_place=True)
    assert set(outcomes(part).values()) == {"kept"}
    assert opened == ["/a.tar"]
    data = (tmp_path / "files" / "a.tar").read_bytes()
    assert (part.shards[0]["nbytes"], part.shards[0]["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_flipped_byte(tmp_path: Path, processor: MQWenProcessor) -> None:
    at_ingest, in_training = rows()["flipped byte"]
    dataset = write_dataset(tmp_path, processor, GOOD)
    flip(dataset, WITH_PICTURES)
    assert reasons(read_epoch(dataset, processor))[WITH_PICTURES] == in_training
    found = outcomes(ingested(processor, tmp_path / "made", WebDatasetSource(dataset), Filters(), in_place=True))
    assert set(found.values()) == {at_ingest}  # ingest has nothing to compare with


def test_invalid_utf8(tmp_path: Path, processor: MQWenProcessor) -> None:
    at_ingest, in_training = rows()["invalid UTF-8"]
    turns = [{"from": "human", "value": "Hi \udcff"}, {"from": "gpt", "value": "!"}]
    part = ingested(processor, tmp_path / "one", Given({"bad": lambda: Sample("bad", from_llava(turns))}), Filters())
    assert outcomes(part) == {"bad": at_ingest}
    body = json.dumps({"messages": [USER, ANSWER], "source": ""}).encode().replace(b"which", b"wh\xffch")
    part = ingested(processor, tmp_path / "two", Given({"bad": lambda: stored_text(body)}), Filters())
    assert outcomes(part) == {"bad": at_ingest}

    dataset = write_dataset(tmp_path / "data", processor, [*GOOD, replace(said(USER, ANSWER), key="bad")])
    file = Path(dataset.path) / "shard-000000.tar"
    file.write_bytes(
        re.sub(rb'(bad\.json.*?"content": "wh)i', lambda found: found[1] + b"\xff", file.read_bytes(), flags=re.DOTALL)
    )
    assert reasons(read_epoch(dataset, processor))["bad"] == in_training


TURNS = [{"from": "human", "value": "which"}, {"from": "gpt", "value": "three"}]
COLUMNS = [
    ("txt", pa.array([b"th\xffree"]), "invalid UTF-8"),
    ("text", not_utf8(), "invalid UTF-8"),
    ("json", pa.array(["not json"]), "JSON that is none"),
    ("json", pa.array([7]), "JSON that is none"),
    ("messages", pa.array([[USER | {"said": datetime(2026, 1, 1)}, ANSWER]]), "field of another kind"),
]


@pytest.mark.parametrize(("name", "column", "line"), COLUMNS)
def test_a_bad_row_of_a_parquet(
    tmp_path: Path, processor: MQWenProcessor, name: str, column: pa.Array, line: str
) -> None:
    """Whether it is ingested anew or where it lies."""
    parquet_file(tmp_path / "files", column, name)
    for in_place in (True, False):
        source = ParquetSource(locate(tmp_path / "files"))
        part = ingested(processor, tmp_path / "made", source, Filters(), in_place)
        assert list(outcomes(part).values()) == [rows()[line][0]]


def test_json_as_a_struct_is_a_conversation(tmp_path: Path, processor: MQWenProcessor) -> None:
    parquet_file(tmp_path / "files", pa.array([{"conversations": TURNS}]), "json")
    part = ingested(processor, tmp_path, ParquetSource(locate(tmp_path / "files")), Filters(), in_place=True)
    assert outcomes(part) == {"rows/0": "kept"}


def test_json_that_is_none(tmp_path: Path, processor: MQWenProcessor) -> None:
    """Of a tar, and of a Parquet whose column was another when it was ingested."""
    at_ingest, in_training = rows()["JSON that is none"]
    part = ingested(processor, tmp_path / "one", Given({"bad": lambda: stored_text(b"{")}), Filters())
    assert outcomes(part) == {"bad": at_ingest}

    parquet_file(tmp_path / "files", pa.array([json.dumps({"conversations": TURNS})]), "json")
    source = ParquetSource(locate(tmp_path / "files"))
    (row,) = ingested(processor, tmp_path, source, Filters(), in_place=True).rows.to_pylist()
    parquet_file(tmp_path / "files", pa.array(["not json"]), "json")
    shard = Shard("shard-000000", "rows.parquet", 1, row["tokens"], 0, 1, "", "")
    place = Place(shard, 0, **{name: row[name] for name in ("key", "offset", "nbytes", "tokens", "images", "sha256")})
    dataset = Dataset(locate(tmp_path), Manifest(Shards([asdict(shard)]), "", {}), locate(tmp_path / "files"))
    found = Samples([dataset], [place]).read(place)
    assert isinstance(found, SampleError)
    assert found.reason == in_training
