"""Captions, tables, tars and Parquet of others: what is taken of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.data.sample import Sample, read_sample
from mqwen.data.sources.captions import QUESTIONS, ChallengerSource, TableSource
from mqwen.data.sources.llava import LlavaSource
from mqwen.data.sources.stored import ParquetSource, WebDatasetSource
from mqwen.storage import locate
from tests.data.making import picture


def read(source: Any, size: int = 1000) -> dict[str, Sample | SampleError]:
    found = [pair for chunk in source.chunks(size) for pair in source.read(chunk)]
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def captioned(key: str, question: str, caption: str, file: bytes, source: str) -> Sample:
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": caption}]
    return Sample(key, turns, [file], source)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for n, name in enumerate(("a.jpg", "b.png", "sub/a.jpg")):
        (folder / name).write_bytes(picture(n, form="JPEG" if name.endswith("jpg") else "PNG"))
    return folder


def test_complex_reasoning_is_llavas_format(pictures: Path) -> None:
    """LLaVA-Instruct's complex_reasoning_77k.json, whose pictures are COCO's train2017: a record as it stands there."""
    human = "What challenges might this city face?\n<image>"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": "The city"}]
    file = pictures / "complex_reasoning_77k.json"
    file.write_text(json.dumps([{"id": "000000215677", "image": "a.jpg", "conversations": turns}]))
    (sample,) = read(LlavaSource(locate(file), locate(pictures))).values()
    assert isinstance(sample, Sample)
    assert sample.messages[0]["content"] == [
        {"type": "text", "text": "What challenges might this city face?"},
        {"type": "image"},
    ]
    assert sample.pictures == [(pictures / "a.jpg").read_bytes()]


def test_challenger(pictures: Path) -> None:
    records = [
        {"url": "http://img", "image_id": "a.jpg", "caption": ["一个人", " 两个人\n", "三个人", "四", "五"]},
        {"url": "http://img", "image_id": "gone.jpg", "caption": ["六"]},
        {"url": "http://img", "image_id": "b.png", "caption": "七"},
        {"image_id": None, "caption": []},
    ]
    file = pictures / "annotations.json"
    file.write_text(json.dumps(records))
    found = read(ChallengerSource(locate(file), locate(pictures), captions=3), size=2)
    assert list(found) == ["a", "a-2", "a-3", "gone", "b", "3"]
    file_a, texts = (pictures / "a.jpg").read_bytes(), ["一个人", "两个人", "三个人"]
    for (key, sample), text in zip(list(found.items())[:3], texts, strict=True):
        assert sample in [captioned(key, question, text, file_a, "a.jpg") for question in QUESTIONS]
    reasons = [str(sample).partition(":")[0] for sample in list(found.values())[3:]]
    assert reasons[0] == "missing picture"
    assert isinstance(found["b"], Sample)
    assert reasons[2] == "conversation"
    with pytest.raises(DataError, match="--captions is 0"):
        ChallengerSource(locate(file), locate(pictures), captions=0).chunks(5)


@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
def test_tables(pictures: Path, name: str) -> None:
    comma = "\t" if name.endswith("tsv") else ","
    lines = [
        ("id", "path", "text"),
        ("1", "a.jpg", '"A cat, on ""a"" mat.\nReally."'),
        ("2", "sub/a.jpg", "猫"),
        ("3", "../a.jpg", "out"),
        ("4", "b.png", ""),
        ("5", "b.png", "caf\udce9"),
    ]
    file = pictures / name
    file.write_bytes(
        b"\xef\xbb\xbf" + "".join(comma.join(line) + "\n" for line in lines).encode("utf-8", "surrogateescape")
    )
    found = list(read(TableSource(locate(file), locate(pictures), "Was?", "path", "text"), size=2).items())
    assert found[0][1] == captioned(
        "a", "Was?", 'A cat, on "a" mat.\nReally.', (pictures / "a.jpg").read_bytes(), "a.jpg"
    )
    assert found[1][1] == captioned("a-2", "Was?", "猫", (pictures / "sub/a.jpg").read_bytes(), "sub/a.jpg")
    assert [str(sample).partition(":")[0] for _, sample in found[2:4]] == ["picture path", "conversation"]
    assert isinstance(found[4][1], Sample)  # of text that ingest itself rejects: see test_faults.py


def test_tables_that_are_none(pictures: Path) -> None:
    file = pictures / "bad.csv"
    source = TableSource(locate(file), locate(pictures), "?")
    with pytest.raises(DataError, match="should be a CSV or TSV file"):
        source.chunks(5)
    file.write_text("path,caption\na.jpg,b\n")
    with pytest.raises(DataError, match="has no column 'image'; it has 'path, caption'"):
        source.chunks(5)
    file.write_text("image,caption\n")
    with pytest.raises(EmptyDatasetError, match="holds no rows"):
        source.chunks(5)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """What webdataset's own writer makes: captions, a JSON caption, LLaVA turns, and a record without a picture."""
    with webdataset.TarWriter(str(tmp_path / "part-0.tar")) as sink:
        sink.write({"__key__": "0001", "jpg": picture(1, form="JPEG"), "txt": "A cat.", "cls": b"\xff\xfe"})
        sink.write(
            {"__key__": "sub/0002", "json": json.dumps({"caption": "A dog.", "source": "web"}), "png": picture(2)}
        )
    with webdataset.TarWriter(str(tmp_path / "part-1.tar")) as sink:
        turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Two."}]
        body = json.dumps({"conversations": turns})
        sink.write({"__key__": "0001", "json": body, "0.png": picture(3), "1.png": picture(4)})
        sink.write({"__key__": "0002", "cls": "5"})
    (tmp_path / "readme.txt").write_text("no tar")
    return tmp_path


def test_tars(tars: Path) -> None:
    source = WebDatasetSource(locate(tars), "What?")
    assert source.chunks(1) == ["part-0.tar", "part-1.tar"]
    found = read(source)
    assert list(found) == ["part-0_0001", "part-0_sub_0002", "part-1_0001", "part-1_0002"]
    one, two, three, four = found.values()
    assert one == captioned("part-0_0001", "What?", "A cat.", picture(1, form="JPEG"), "part-0/0001")
    assert two == captioned("part-0_sub_0002", "What?", "A dog.", picture(2), "web")
    assert isinstance(three, Sample) and three.pictures == [picture(3), picture(4)]
    assert str(four).startswith("conversation: none of the fields 'cls' holds one")
    for name in source.chunks(1):
        data = (tars / name).read_bytes()
        for key, sample, offset, nbytes in source.scan(tars / name):
            if isinstance(sample, Sample):
                again = read_sample(data[offset : offset + nbytes], "What?")
                assert again == sample
                assert key == f"{name.removesuffix('.tar')}/{again.key}"


def test_long_names_give_keys_of_their_own(tmp_path: Path) -> None:
    """Though each tar's keys are made without a look at the others', and all begin alike."""
    names = [f"{'a-long-name-' * 6}{n}" for n in range(2)]
    for name in names:
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as sink:
            sink.write({"__key__": "0001", "txt": "A cat.", "png": picture(1)})
    found = read(WebDatasetSource(locate(tmp_path)))
    assert len(found) == 2
    assert all(key.startswith("a-long-name-") and len(key) <= 64 for key in found)
    assert found == read(WebDatasetSource(locate(tmp_path)))


def test_names_longer_than_a_header(tmp_path: Path) -> None:
    """In tars of GNU's and PAX's forms, whose long names stand in members of their own."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            for key in ("x" * 150, "图" * 60):
                for name, content in ((f"{key}.txt", b"A cat."), (f"{key}.png", picture(1))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        source = WebDatasetSource(locate(tmp_path))
        data = (tmp_path / "long.tar").read_bytes()
        scanned = list(source.scan(tmp_path / "long.tar"))
        assert [key for key, *_ in scanned] == ["long/" + "x" * 150, "long/" + "图" * 60]
        for _, sample, offset, nbytes in scanned:
            assert isinstance(sample, Sample)
            assert read_sample(data[offset : offset + nbytes], source.question) == sample


def test_parquet(tmp_path: Path) -> None:
    """Columns as Hugging Face's datasets library stores its Image feature."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(5)]
    captions = ["one", "two", "three", "four", None]
    table = pa.table({"image": pa.array(pictures, image), "text": captions, "label": [1] * 5})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    talk = [[{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Two."}]]
    table = pa.table({"images": pa.array([pictures[:2]], pa.list_(image)), "conversations": talk})
    pq.write_table(table, tmp_path / "b.parquet")
    found = read(ParquetSource(locate(tmp_path), "What?"))
    assert list(found) == [f"a_{n}" for n in range(5)] + ["b_0"]
    assert found["a_2"] == captioned("a_2", "What?", "three", picture(2), "a/2")
    assert str(found["a_4"]).startswith("conversation: none of the fields")
    many = found["b_0"]
    assert isinstance(many, Sample) and many.pictures == [picture(0), picture(1)]


def test_files_that_are_damaged_or_not_there(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.parquet files"):
        ParquetSource(locate(tars)).chunks(1)
    whole = (tars / "part-0.tar").read_bytes()
    for length in (0, 300, 700, 1100, 2300):
        (tars / "part-0.tar").write_bytes(whole[:length])
        *_, (key, last, _, _) = WebDatasetSource(locate(tars)).scan(tars / "part-0.tar")
        assert key == "part-0.tar" and str(last).startswith("damaged file: part-0.tar cannot be read behind byte"), (
            length
        )
    (tars / "a.parquet").write_bytes(b"PAR1 no Parquet PAR1")
    ((key, found, _, _),) = ParquetSource(locate(tars)).scan(tars / "a.parquet")
    assert key == "a.parquet" and str(found).startswith("damaged file: a.parquet cannot be read behind row 0")
