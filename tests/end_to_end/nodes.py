"""A cluster as operators start it: `ray start --head` with a token, a second node, and object storage beside it."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import KEYS, set_all
from tests.end_to_end.commands import ROOT, Shell, shell
from tests.scraping import FAST

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(ready: Callable[[], bool], seconds: float = 90) -> None:
    """Until a server that starts is ready."""
    limit = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < limit
        time.sleep(0.2)


@dataclass
class Cluster:
    """`shell` runs commands on it; `dashboard` takes jobs; `bucket` is an s3:// URI that its commands can reach.

    `add_node` starts a node of two logical CPUs; the cluster begins with a head and `second`.
    """

    shell: Shell
    dashboard: str
    bucket: str
    add_node: Callable[[], subprocess.Popen]
    second: subprocess.Popen

    def submit(self, *words: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, with README's one command; follows the job to its end."""
        environment = self.shell.environment() | ({"RAY_AUTH_TOKEN": token} if token else {})
        del environment["RAY_ADDRESS"]  # who submits knows the dashboard alone
        made = subprocess.run(
            [sys.executable, "infra/runtime_env.py"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        command = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--runtime-env-json", made.stdout, "--"]
        return subprocess.run(
            [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )


@contextmanager
def cluster(s3: str) -> Iterator[Cluster]:
    """`s3` is the URL of a server with the bucket `bucket`."""
    port, dashboard = free_port(), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    keys = {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3}
    with shell() as found, pytest.MonkeyPatch.context() as patch:
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}  # a submitted job is run with the nodes' `python`
        found.variables = token | keys | path | FAST
        asking = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}

        def start_node(*words: str) -> subprocess.Popen:
            agent = free_port()  # two nodes on one machine must not share the agent's, which jobs are sent to
            words = (*words, "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--num-cpus=2")
            command = [str(BIN / "ray"), "start", *words, "--disable-usage-stats", "--block"]
            with (found.ray_folder / f"node-{agent}.log").open("w") as log:
                node = subprocess.Popen(
                    command, cwd=ROOT, env=found.environment(), stdout=log, stderr=log, start_new_session=True
                )
            wait(lambda: httpx.get(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", headers=asking).is_success)
            return node

        start_node("--head", f"--port={port}", f"--dashboard-port={dashboard}")
        set_all(patch, **keys)
        url = f"http://127.0.0.1:{dashboard}"
        wait(lambda: httpx.get(f"{url}/api/version", headers=asking).is_success)

        def add_node() -> subprocess.Popen:
            return start_node(f"--address=127.0.0.1:{port}")

        second = add_node()
        found.variables |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        yield Cluster(found, url, f"s3://bucket/{secrets.token_hex(8)}", add_node, second)


def lose(node: subprocess.Popen) -> None:
    """As if its power were cut: all its processes at once."""
    for process in [*psutil.Process(node.pid).children(recursive=True), node]:
        process.kill()
    node.wait()
