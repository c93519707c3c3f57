"""One URI to one filesystem, and files that are there whole or not at all."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mqwen.storage import Location, MissingFileError, StorageError, TruncatedFileError, locate


def test_a_folder_and_a_file_uri_are_the_same_place(tmp_path: Path) -> None:
    folder = tmp_path / "with space 和"
    (locate(folder) / "a" / "b.txt").write_bytes(b"text")
    by_uri = locate(folder.as_uri()) / "a" / "b.txt"
    assert by_uri.read_bytes() == (folder / "a" / "b.txt").read_bytes() == b"text"
    assert (by_uri.name, by_uri.size(), by_uri.exists()) == ("b.txt", 4, True)
    assert str(locate(folder) / "a") == str(folder / "a")
    assert by_uri.sha256() == hashlib.sha256(b"text").hexdigest()


def test_relative_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert locate("data").path == str(tmp_path / "data")
    assert locate("~/data").path == str(tmp_path / "home" / "data")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "'gs://bucket/x' names no storage; a folder, file:// or s3:// is allowed"),
        ("http://host/x", "names no storage"),
        ("", "names no storage"),
        ("file://relative", "cannot be reached"),
        ("file:///", "names no place"),
        ("s3://", "names no place"),
    ],
)
def test_what_is_no_place(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        locate(uri)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder that is not there yet."""
    return locate(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("bucket") / "folder"


@pytest.fixture
def place(folder: Location) -> Location:
    """A file that is not there yet."""
    return folder / "file"


def test_replace_is_all_or_nothing(folder: Location, place: Location) -> None:
    with pytest.raises(RuntimeError), place.replace() as stream:
        stream.write(b"half of it")
        raise RuntimeError
    assert folder.names() == []
    with place.replace() as stream:
        stream.write(b"one")
        assert not place.exists()
    assert place.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), place.replace() as stream:
        stream.write(b"half of another")
        raise KeyboardInterrupt
    assert place.read_bytes() == b"one"
    place.write_bytes(b"two")
    assert (folder.names(), place.read_bytes()) == (["file"], b"two")


def test_two_writers_at_once(tmp_path: Path) -> None:
    place = locate(tmp_path) / "file"
    with place.replace() as first:
        first.write(b"first")
        with place.replace() as second:
            second.write(b"second")
        assert place.read_bytes() == b"second"
    assert place.read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_read_range(place: Location) -> None:
    place.write_bytes(bytes(range(100)))
    assert place.read_range(10, 5) == bytes(range(10, 15))
    assert place.read_range(95, 5) == bytes(range(95, 100))
    for start, length, there in ((95, 6, 5), (100, 1, 0), (1000, 10, 0)):
        with pytest.raises(TruncatedFileError, match=f"{length} bytes from {start} on, the file ends after {there} of"):
            place.read_range(start, length)
    with pytest.raises(TruncatedFileError) as raised:
        place.read_range(98, 10)
    assert raised.value.data == pickle.loads(pickle.dumps(raised.value)).data == bytes([98, 99])  # noqa: S301


NAMES = {
    "local": ("nothing", "file/inside", "n" * 300, "nul\0", "half \ud800", "", "."),
    "s3": ("nothing", "file/inside", ""),
}


def test_what_is_no_file(folder: Location, tmp_path: Path) -> None:
    (folder / "file").write_bytes(b"")
    names = NAMES["s3" if folder.uri.startswith("s3") else "local"]
    for name in names:
        for read in (Location.read_bytes, Location.sha256, lambda place: place.read_range(0, 1)):
            with pytest.raises(MissingFileError, match="does not exist or is no file"):
                read(folder / name)
    with pytest.raises(MissingFileError):
        (folder / "nothing").download(tmp_path / "copy")
    assert not (folder / "nothing").exists()
    assert (folder / "nothing").names() == []
    (folder / "nothing").delete()


def test_what_fails_is_named(tmp_path: Path) -> None:
    """Neither a trace nor a claim that the file is missing."""
    (tmp_path / "file").write_bytes(b"")
    for place in (locate(tmp_path) / "file" / "inside", locate(tmp_path), locate(tmp_path) / "nul\0"):
        with pytest.raises(StorageError, match=f"^{re.escape(str(place))} cannot be written") as written:
            place.write_bytes(b"")
        assert not isinstance(written.value, MissingFileError)
    if os.getuid():  # root may read all
        (tmp_path / "file").chmod(0)
        with pytest.raises(StorageError, match="cannot be read") as raised:
            (locate(tmp_path) / "file").read_bytes()
        assert not isinstance(raised.value, MissingFileError)


def test_an_etag_changes_with_the_file(folder: Location, place: Location) -> None:
    assert place.etag() is None
    place.write_bytes(b"one")
    first = place.etag()
    assert first == place.etag()
    assert folder.etag() is None
    place.write_bytes(b"two")  # as long as the first, and written in the same second
    assert first != place.etag()


def test_up_and_down_names_and_delete(folder: Location, place: Location, tmp_path: Path) -> None:
    content = os.urandom(12_000_000)  # more than a chunk, and more than a part of an upload
    (tmp_path / "source").write_bytes(content)
    place.upload(tmp_path / "source")
    place.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert place.sha256() == hashlib.sha256(content).hexdigest()
    (folder / "another").write_bytes(b"")
    assert folder.names() == ["another", "file"]
    place.delete()
    assert folder.names() == ["another"]
    folder.delete()
    assert not folder.exists()


def test_what_lies_inside(folder: Location, bucket: Location, tmp_path: Path) -> None:
    assert folder.is_inside(folder)
    assert (folder / "a" / "b").is_inside(folder)
    assert not folder.is_inside(folder / "a")
    assert not (folder / "ab").is_inside(folder / "a")
    assert not locate(tmp_path).is_inside(bucket)


def test_a_location_travels_to_another_process(place: Location, tmp_path: Path) -> None:
    place.write_bytes(b"here")
    (tmp_path / "pickled").write_bytes(pickle.dumps(place))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb')).read_bytes())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "b'here'"
    again = pickle.loads(pickle.dumps(place))  # noqa: S301
    assert again == place and hash(again) == hash(place)
