"""The digest after the loss of a node, and after a restart of the S3 server, both while rows are read."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenProcessor
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import locate
from tests.conftest import KEYS, set_all
from tests.data.digest import digest, plain_steps, ranks_steps
from tests.data.making import random_sample, write_dataset
from tests.data.test_digest import SETTINGS
from tests.data.three_nodes import PER_STEP, STEPS, WORKERS, stream_of
from tests.end_to_end.nodes import free_port

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]


def test_a_node_of_three_is_lost(tmp_path: Path, processor: MQWenProcessor, vocabulary: Path) -> None:
    write_dataset(tmp_path / "data", processor, [random_sample(seed) for seed in range(200)])
    words = [str(tmp_path / "data"), str(vocabulary / VOCABULARY_FILE)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.three_nodes", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    found = re.search(r"(\d) nodes, digest (\w+)", done.stdout)
    assert found, done.stderr[-3000:]
    assert found[1] == "2"
    assert found[2] == digest(plain_steps(stream_of(*words), PER_STEP, STEPS))


@contextmanager
def rclone(folder: Path, port: int) -> Iterator[None]:
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", folder, "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", ",".join(KEYS.values()), "--config", "/dev/null"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        next(line for line in server.stderr if "Starting s3 server" in line)
        yield
        server.kill()


@pytest.mark.usefixtures("cluster", "no_aws")
def test_the_s3_server_is_restarted(tmp_path: Path, processor: MQWenProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is away for two seconds, in which readers are at work: there are far more rows than are taken."""
    folder, port = tmp_path / "buckets" / "bucket" / "data", free_port()
    local = Order([open_dataset(write_dataset(folder, processor, [random_sample(n) for n in range(200)]))], SETTINGS)
    set_all(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_REGION="us-east-1", **KEYS)
    server = rclone(tmp_path / "buckets", port)
    server.__enter__()
    stream = Stream(Order([open_dataset(locate("s3://bucket/data"))], SETTINGS), processor, rows=100_000)
    restarted = []

    def restart(rank: int, step: int) -> None:
        nonlocal server
        if rank == 0 and step in (20, 40):
            server.__exit__(None, None, None)
            time.sleep(2)
            server = rclone(tmp_path / "buckets", port)
            server.__enter__()
            restarted.append(step)

    found = digest(ranks_steps(stream, WORKERS, PER_STEP, STEPS, Position(), restart))
    server.__exit__(None, None, None)
    assert restarted == [20, 40]
    assert found == digest(plain_steps(replace(stream, order=local), PER_STEP, STEPS))
