"""Folders on S3 for libraries that know only local ones."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mqwen.storage import Location, StorageError, filled, local_folder, locate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mqwen"


@pytest.fixture
def artifact(bucket: Location) -> Location:
    for name in ("config.json", "weights.safetensors"):
        (bucket / "artifact" / name).write_bytes(b"1")
    (bucket / "artifact" / "folder" / "file").write_bytes(b"")  # not directly in it
    return bucket / "artifact"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_local_folder_is_itself(tmp_path: Path, cache: Path) -> None:
    assert local_folder(locate(tmp_path)) == local_folder(locate(tmp_path.as_uri())) == tmp_path
    assert not cache.exists()


def test_a_copy_is_made_once_and_again_when_the_files_change(artifact: Location, cache: Path) -> None:
    first = local_folder(artifact)
    assert content(first) == {"config.json": b"1", "weights.safetensors": b"1"}
    made = (first / "config.json").stat()
    assert local_folder(artifact) == first
    assert (first / "config.json").stat() == made
    copies = [first]
    for number in (b"2", b"3"):
        (artifact / "weights.safetensors").write_bytes(number)
        copies.append(local_folder(artifact))
        assert content(copies[-1]) == {"config.json": b"1", "weights.safetensors": number}
    assert [copy.exists() for copy in copies] == [False, True, True]  # the last but one may be in use
    assert [folder.stat().st_mode & 0o777 for folder in cache.iterdir()] == [0o700]


def test_what_is_not_wanted_is_not_fetched(artifact: Location) -> None:
    assert content(local_folder(artifact, without="*.safetensors")) == {"config.json": b"1"}
    assert len(content(local_folder(artifact))) == 2


def test_nothing_there(artifact: Location, bucket: Location, tmp_path: Path) -> None:
    for place in (artifact, locate(tmp_path)):
        with pytest.raises(StorageError, match=f"^{place} holds no other; give a folder with that file$"):
            local_folder(place, needs="other")
    with pytest.raises(StorageError, match=f"^{bucket}/nothing holds no files$"):
        local_folder(bucket / "nothing")


def test_many_at_once_share_one_copy(artifact: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    download = Location.download
    monkeypatch.setattr(Location, "download", lambda self, file: (fetched.append(self.name), download(self, file)))
    with ThreadPoolExecutor(4) as pool:
        (copy,) = set(pool.map(local_folder, [artifact] * 4))
    assert sorted(fetched) == sorted(content(copy)) == ["config.json", "weights.safetensors"]


def test_a_copy_that_broke_off_is_never_taken_for_whole(artifact: Location, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    broken = context.Process(target=copy_and_die, args=(artifact,))
    broken.start()
    broken.join()
    assert broken.exitcode == 9
    (home,) = cache.iterdir()
    (left,) = (path for path in home.iterdir() if path.is_dir())
    assert left.name.startswith("partial-")
    assert len(content(local_folder(artifact))) == 2
    assert not left.exists()


def copy_and_die(location: Location) -> None:
    Location.download = lambda self, file: os._exit(9)  # type: ignore[method-assign]
    local_folder(location)


def test_files_that_change_meanwhile(artifact: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Location.download

    def change_and_download(self: Location, file: Path) -> None:
        download(self, file)
        (artifact / "config.json").write_bytes(b"2")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "download", change_and_download)
        with pytest.raises(StorageError, match="was changed while it was copied; try again"):
            local_folder(artifact)
    assert content(local_folder(artifact))["config.json"] == b"2"


def test_a_folder_is_filled_with_its_last_file_last(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    target = bucket / "artifact"
    for name in ("config.json", "old.safetensors"):
        (target / name).write_bytes(b"old")
    seen = []
    upload = Location.upload

    def watch(self: Location, file: Path) -> None:
        seen.append((self.name, (target / "config.json").exists()))
        upload(self, file)

    monkeypatch.setattr(Location, "upload", watch)
    with filled(target, last="config.json") as folder:
        for name in ("a.safetensors", "config.json", "z.json"):
            (folder / name).write_bytes(name.encode())
        assert (target / "config.json").read_bytes() == b"old"
    assert seen == [("a.safetensors", False), ("z.json", False), ("config.json", False)]
    assert content(local_folder(target)) == {n: n.encode() for n in ("a.safetensors", "config.json", "z.json")}


def test_what_fails_leaves_the_target_as_it_was(bucket: Location, tmp_path: Path) -> None:
    (bucket / "config.json").write_bytes(b"old")
    with pytest.raises(RuntimeError), filled(bucket, last="config.json") as folder:
        (folder / "config.json").write_bytes(b"new")
        raise RuntimeError
    assert (bucket / "config.json").read_bytes() == b"old"


@pytest.mark.parametrize("there", ["notes.txt", "checkpoints/step-00000001/checkpoint.json"])
def test_what_is_something_else_is_not_filled(bucket: Location, tmp_path: Path, there: str) -> None:
    """A folder of other files, or one that holds more than an earlier artifact, as a run's."""
    for target in (bucket / "target", locate(tmp_path / "target")):
        (target / there).write_bytes(b"mine")
        if "/" in there:
            (target / "config.json").write_bytes(b"{}")
        with (
            pytest.raises(StorageError, match="holds other files"),
            filled(target, "config.json"),
        ):
            pass


def test_a_local_folder_holds_what_was_filled_in_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    for round_ in ("first", "second"):
        with filled(locate(target), last="config.json") as folder:
            for name in (round_, "config.json"):
                (folder / name).write_text(round_)
            assert not (target / round_).exists()
        assert content(target) == {round_: round_.encode(), "config.json": round_.encode()}


def test_a_local_folder_that_is_not_filled_whole_stays_as_it_was(tmp_path: Path) -> None:
    """Where the block fails, and where its process is killed; what that one leaves is gone after the next filling."""
    target = tmp_path / "artifact"
    for old in ({}, {"config.json": b"old", "old.safetensors": b"old"}):
        for name, data in old.items():
            (locate(target) / name).write_bytes(data)
        with pytest.raises(RuntimeError), filled(locate(target), last="config.json") as folder:
            (folder / "config.json").write_bytes(b"new")
            raise RuntimeError
        assert target.exists() == bool(old)
    assert content(target) == old
    killed = multiprocessing.get_context("spawn").Process(target=fill_and_die, args=(target,))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == old
    with filled(locate(target), last="config.json") as folder:
        (folder / "config.json").write_bytes(b"new")
    assert content(target) == {"config.json": b"new"}


def fill_and_die(target: Path) -> None:
    with filled(locate(target), last="config.json") as folder:
        (folder / "config.json").write_bytes(b"half")
        os._exit(9)


def test_a_file_that_is_read_stays_whole_for_its_reader(tmp_path: Path) -> None:
    """A server has the old weights mapped: written over in place they would change under it."""
    for data in (b"old", b"new"):
        with filled(locate(tmp_path), last="config.json") as folder:
            (folder / "config.json").write_bytes(data)
        if data == b"old":
            reader = (tmp_path / "config.json").open("rb")
    with reader:
        assert reader.read() == b"old"
