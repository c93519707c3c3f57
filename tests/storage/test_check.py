"""What a command says before it starts anything: one line, within ten seconds."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mqwen.storage import Location, StorageError, locate, readable, writable
from tests.conftest import KEYS, Rclone, set_all

LIMIT = 10  # seconds
CHECKS = [readable, writable]


def refusal(check: Callable[[str], Location], uri: str) -> str:
    """What the check says, which must be one line, said soon."""
    started = time.monotonic()
    with pytest.raises(StorageError) as raised:
        check(uri)
    assert time.monotonic() - started < LIMIT
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_place_that_answers_is_left_as_it_was(bucket: Location, tmp_path: Path) -> None:
    for uri in (str(bucket / "new"), str(tmp_path / "new" / "deep"), (tmp_path / "new").as_uri()):
        assert readable(uri) == writable(uri) == locate(uri)
    assert bucket.names() == list(tmp_path.iterdir()) == []


def test_a_submitted_jobs_copy_is_no_place_to_stay(tmp_path: Path) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "out"
    readable(str(copy))
    assert "Ray deletes after the job: give an absolute folder, or s3://" in refusal(writable, str(copy))


@pytest.mark.parametrize("check", CHECKS)
def test_a_bucket_that_is_not_there(bucket: Location, moto: str, check: Callable[[str], Location]) -> None:
    assert refusal(check, "s3://nowhere/data").endswith(f"{moto} has no bucket 'nowhere'; make it, or name another")
    assert refusal(check, "s3://no bucket/data").endswith("'no bucket' is no name of a bucket")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("wrong", "code"),
    [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")],
)
def test_wrong_keys(
    rclone: Rclone, monkeypatch: pytest.MonkeyPatch, wrong: str, code: str, check: Callable[[str], Location]
) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL=rclone.url, AWS_CA_BUNDLE=rclone.ca_bundle, **KEYS)
    check("s3://bucket/data")
    monkeypatch.setenv(wrong, "wrong")
    said = refusal(check, "s3://bucket/data")
    assert said.startswith("s3://bucket/data cannot be ")
    assert f"{rclone.url} refuses the keys ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or" in said


def test_no_keys(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    assert "no AWS credentials were found; set AWS_ACCESS_KEY_ID" in refusal(readable, "s3://bucket/data")


def test_a_certificate_that_is_not_trusted(rclone: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL=rclone.url, **KEYS)
    said = refusal(readable, "s3://bucket/data")
    assert f"the certificate of {rclone.url} is not trusted" in said
    assert "AWS_CA_BUNDLE" in said


@pytest.fixture(params=["refuses", "swallows connections", "is mute"])
def dead(request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint that does not answer."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        if request.param != "refuses":
            server.listen(0 if request.param == "swallows connections" else 50)
        if request.param == "swallows connections":  # these fill the queue, and further ones get no answer at all
            for client in (first, second):
                client.setblocking(False)
                client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_endpoint_that_does_not_answer(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL=dead, **KEYS)
    said = refusal(writable, "s3://bucket/data")
    assert said.endswith(f": {dead} does not answer; is it up, and AWS_ENDPOINT_URL right?")


def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL="localhost:9000", **KEYS)
    said = refusal(readable, "s3://bucket/data")
    assert said == "AWS_ENDPOINT_URL 'localhost:9000' is no endpoint; http://HOST:PORT or https://HOST is allowed"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    said = refusal(writable, str(tmp_path / "file" / "new"))
    assert said == f"{tmp_path}/file/new cannot be written (Not a directory); choose another place"
    assert "/proc/1/new cannot be written" in refusal(writable, "/proc/1/new")
    if os.getuid():  # root may write all
        tmp_path.chmod(0o500)
        assert refusal(writable, str(tmp_path / "new")).endswith("(Permission denied); choose another place")
