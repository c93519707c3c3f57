"""Two S3 servers. moto_server knows all of S3 that is used here and checks no keys; rclone, here over TLS, checks keys
but cannot make a folder's marker, as Arrow does when the last file of a folder is deleted."""

import datetime
import ipaddress
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import ray  # noqa: F401  before mqwen.cluster, which would have this process's Ray ask for a token
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mqwen.demo.storage import s3_server
from mqwen.storage import Location, locate

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton looks at this when it is imported

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and so its children

STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process at once. A whole suite loads Ray, Arrow's S3, torch and gloo into one process, and now and then
    their threads crash the interpreter on its way out, when all results are known and printed. The commands that users
    run end by themselves, and tests/end_to_end holds them to their exit codes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash.get(STATUS, 1))


KEYS = {"AWS_ACCESS_KEY_ID": "known", "AWS_SECRET_ACCESS_KEY": "and-its-secret"}


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a moto_server with an empty bucket, `bucket`."""
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as url:
        make_bucket(url)
        yield url


def make_bucket(url: str) -> None:
    secret, region = KEYS["AWS_SECRET_ACCESS_KEY"], "us-east-1"
    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": secret}
    boto3.client("s3", endpoint_url=url, region_name=region, **keys).create_bucket(Bucket="bucket")


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but a test's own, and no look-up of an instance's role."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))


def set_all(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(moto: str, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A place of its own for each test, in moto's bucket."""
    set_all(monkeypatch, AWS_ENDPOINT_URL=moto, **KEYS)
    return locate(f"s3://bucket/{uuid.uuid4().hex}")


@dataclass(frozen=True)
class Rclone:
    """`folder` is what lies in the bucket `bucket`."""

    url: str
    ca_bundle: str
    folder: Path


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "buckets" / "bucket").mkdir(parents=True)
    certificate, key = make_certificate(folder)
    known = ",".join(KEYS.values())
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", folder / "buckets", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", known, "--cert", certificate, "--key", key, "--config", "/dev/null"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        started = next(line for line in server.stderr if "Starting s3 server" in line)  # it logs no requests after it
        url = re.search(r"https://[\d.:]+", started)
        assert url is not None
        yield Rclone(url[0], str(certificate), folder / "buckets" / "bucket")
        server.terminate()


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, and of these names, that nobody trusts yet, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), *map(x509.DNSName, names)]
    )
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return folder / "certificate", folder / "key"
