"""Where endpoint, region and credentials come from, and that they reach other processes."""

import json
import pickle
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mqwen.storage import Location, StorageError, locate
from mqwen.storage.s3 import S3, S3Settings, find_settings
from tests.conftest import KEYS, Rclone, set_all

PROFILE = """
[profile lab]
region = eu-central-1
endpoint_url = https://s3.lab:9000
aws_access_key_id = from-the-profile
aws_secret_access_key = secret
"""
ROLE = """
[profile lab]
region = us-east-1
role_arn = arn:aws:iam::123456789012:role/lab
source_profile = other
[profile other]
aws_access_key_id = a
aws_secret_access_key = b
"""
# What a credential_process answers.
ANSWER = {"Version": 1, "SessionToken": "", "Expiration": "2099-01-01T00:00:00Z"}


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"AWS_REGION": "eu-west-3", "AWS_SESSION_TOKEN": "token", "AWS_CA_BUNDLE": "/trusted"}
    set_all(monkeypatch, AWS_ENDPOINT_URL="http://one:9000", **variables, **KEYS)
    found = find_settings()
    assert found == S3Settings("http://one:9000", "eu-west-3", "/trusted", *KEYS.values(), "token")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://two")
    assert find_settings().endpoint == "https://two"
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in repr(found)
    assert "token" not in repr(found)


def test_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text(PROFILE)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    expected = S3Settings("https://s3.lab:9000", "eu-central-1", None, "from-the-profile", "secret")
    assert find_settings() == expected
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(StorageError, match=r"configuration cannot be used: .*\(missing\)"):
        find_settings()


def test_a_role_of_a_profile_would_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text(ROLE)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(StorageError, match=r"assumes a role, whose keys would end.*export-credentials"):
        locate("s3://bucket/data")


def test_keys_that_renew_themselves_are_left_to_the_sdk(
    rclone: Rclone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that gives keys for some minutes: Arrow's SDK asks it again itself, here and in other processes."""
    keys = dict(zip(("AccessKeyId", "SecretAccessKey"), KEYS.values(), strict=True))
    (tmp_path / "answer").write_text(json.dumps(ANSWER | keys))
    (tmp_path / "aws-config").write_text(f"[profile lab]\ncredential_process = cat {tmp_path / 'answer'}\n")
    set_all(monkeypatch, AWS_PROFILE="lab", AWS_ENDPOINT_URL=rclone.url, AWS_CA_BUNDLE=rclone.ca_bundle)
    place = locate("s3://bucket/renewed")
    assert isinstance(place.filesystem, S3)
    assert place.filesystem.settings.access_key is None
    place.write_bytes(b"written")
    assert (rclone.folder / "renewed").read_bytes() == b"written"


def test_aws_itself_needs_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **KEYS)
    with pytest.raises(StorageError, match="no AWS region is set; set AWS_REGION to the bucket's"):
        locate("s3://bucket/data")
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    found = locate("s3://bucket/data").filesystem
    assert isinstance(found, S3)
    assert (found.settings.endpoint, found.region) == (None, "ap-south-1")


def test_settings_travel_and_share_one_filesystem(bucket: Location) -> None:
    again = pickle.loads(pickle.dumps([bucket, bucket / "inside", bucket.filesystem]))  # noqa: S301
    assert again[0].filesystem is again[1].filesystem is again[2] is bucket.filesystem


def test_another_process_needs_no_environment(rclone: Rclone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys and endpoint come with the location, as to a worker on another node; rclone takes the right keys only."""
    set_all(monkeypatch, AWS_ENDPOINT_URL=rclone.url, AWS_CA_BUNDLE=rclone.ca_bundle, **KEYS)
    place = locate("s3://bucket/file")
    place.write_bytes(b"here")
    (tmp_path / "pickled").write_bytes(pickle.dumps(place))
    for name in ("AWS_ENDPOINT_URL", "AWS_CA_BUNDLE", *KEYS):
        monkeypatch.delenv(name)
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb')).read_bytes())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "b'here'", found.stderr


def test_a_server_that_fails_for_a_moment_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [503, 500, 200]

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answers.pop(0))
            self.send_header("Content-Length", "5")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        set_all(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}", **KEYS)
        assert locate("s3://bucket/file").size() == 5
        server.shutdown()
        thread.join()
    assert answers == []


def test_wrong_keys_later_are_one_line(rclone: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL=rclone.url, AWS_CA_BUNDLE=rclone.ca_bundle, **KEYS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=re.escape("s3://bucket/data cannot be listed: ")) as raised:
        locate("s3://bucket/data").names()
    assert "SIGNATURE_DOES_NOT_MATCH" in str(raised.value)
