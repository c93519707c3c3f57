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

    `add_node` starts a node; the cluster begins with a head and `second`. `add_head` starts a head where the one before
    was.
    """

    shell: Shell
    dashboard: str
    bucket: str
    add_node: Callable[[], subprocess.Popen]
    add_head: Callable[[], subprocess.Popen]
    head: subprocess.Popen
    second: subprocess.Popen

    def submit(
        self, *words: str, options: tuple[str, ...] = (), token: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, with README's one command; follows the job to its end, unless `options` say otherwise."""
        environment = self.shell.environment() | ({"RAY_AUTH_TOKEN": token} if token else {})
        del environment["RAY_ADDRESS"]  # who submits knows the dashboard alone
        made = subprocess.run(
            [sys.executable, "infra/runtime_env.py"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        command = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--runtime-env-json", made.stdout]
        return subprocess.run(
            [*command, *options, "--", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )


@contextmanager
def cluster(s3: str, head_cpus: int = 2, node_cpus: int = 2, **variables: str) -> Iterator[Cluster]:
    """`s3` is the URL of a server with the bucket `bucket`; CPUs are logical ones; `variables` are in its nodes'
    environment."""
    port, dashboard = free_port(), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    keys = {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3}
    with shell() as found, pytest.MonkeyPatch.context() as patch:
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}  # a submitted job is run with the nodes' `python`
        found.variables = token | keys | path | FAST | variables
        asking = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}

        def start_node(*words: str) -> subprocess.Popen:
            agent = free_port()  # two nodes on one machine must not share the agent's, which jobs are sent to
            words = (*words, "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}")
            command = [str(BIN / "ray"), "start", *words, "--disable-usage-stats", "--block"]
            with (found.ray_folder / f"node-{agent}.log").open("w") as log:
                node = subprocess.Popen(
                    command, cwd=ROOT, env=found.environment(), stdout=log, stderr=log, start_new_session=True
                )
            wait(lambda: httpx.get(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", headers=asking).is_success)
            return node

        url = f"http://127.0.0.1:{dashboard}"

        def add_head() -> subprocess.Popen:
            # A head refuses to start where this file says that one runs; the nodes of other machines would not have it.
            (found.ray_folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
            words = "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--num-cpus={head_cpus}"
            head = start_node(*words)
            wait(lambda: httpx.get(f"{url}/api/version", headers=asking).is_success)
            return head

        head = add_head()
        set_all(patch, **keys)

        def add_node() -> subprocess.Popen:
            return start_node(f"--address=127.0.0.1:{port}", f"--num-cpus={node_cpus}")

        second = add_node()
        found.variables |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        yield Cluster(found, url, f"s3://bucket/{secrets.token_hex(8)}", add_node, add_head, head, second)


def lose(node: subprocess.Popen) -> None:
    """As if its power were cut: all its processes at once."""
    for process in [*psutil.Process(node.pid).children(recursive=True), node]:
        process.kill()
    node.wait()
