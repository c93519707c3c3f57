"""jobs/ingest.py as a user runs it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mqwen.data.manifest import read_manifest
from mqwen.storage import locate
from tests.data.making import picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray's files go: as long as it is empty, no Ray was started."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def run(ray_folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    own = {"RAY_TMPDIR": str(ray_folder), "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, "jobs/ingest.py", *map(str, arguments)],
        cwd=ROOT,
        env=env | own,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = []
    for n in range(5):
        (folder / f"{n}.png").write_bytes(picture(n))
        records.append({"id": str(n), "image": f"{n}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "empty.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--conversatoins", "x"], "--conversations"),
        (["--conversations", "{tmp}/nowhere.json"], "error: {tmp}/nowhere.json does not exist"),
        (["--conversations", "{tmp}/empty.json"], "error: {tmp}/empty.json holds no conversations"),
        (["--tokenizer", "{tmp}/photos"], "error: {tmp}/photos holds no qwen.tiktoken"),
    ],
)
def test_wrong_options_before_ray_starts(
    tmp_path: Path, ray_folder: Path, photos: Path, vocabulary: Path, change: list[str], message: str
) -> None:
    options = {
        "--conversations": tmp_path / "data.json",
        "--pictures": photos,
        "--dataset": tmp_path / "out",
        "--tokenizer": vocabulary,
        change[0]: change[1].format(tmp=tmp_path),
    }
    ended = run(ray_folder, "llava", *[word for option in options.items() for word in option])
    assert ended.returncode == 2
    assert message.format(tmp=tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert list(ray_folder.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_small_folder(tmp_path: Path, ray_folder: Path, photos: Path, vocabulary: Path) -> None:
    words = ["--conversations", tmp_path / "data.json", "--pictures", photos, "--tokenizer", vocabulary]
    ended = run(ray_folder, "llava", *words, "--dataset", tmp_path / "out", "--settings.shard-samples", 2)
    assert ended.returncode == 0, ended.stderr
    manifest = read_manifest(locate(tmp_path / "out"))
    tokens = sum(shard.tokens for shard in manifest.shards)
    assert ended.stdout.splitlines()[-1] == f"{tmp_path / 'out'}: 5 samples, {tokens} tokens in 3 shards"
    assert "chunk 3/3" in ended.stdout
    assert "Traceback" not in ended.stderr

    def belongs(process: psutil.Process) -> bool:
        try:
            return process.environ().get("RAY_TMPDIR") == str(ray_folder)
        except psutil.Error:
            return False

    _, left = psutil.wait_procs([process for process in psutil.process_iter() if belongs(process)], timeout=30)
    assert not left, [process.cmdline() for process in left]
