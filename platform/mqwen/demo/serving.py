"""The demo's server: `serve run` as a user types it, on a free port, with a key made for this one run."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from mqwen.demo.stages import StageError, Stages
from mqwen.release.client import Server
from mqwen.storage import Location

START_LIMIT = 180.0  # seconds
HOST = "127.0.0.1"


@contextmanager
def served(stages: Stages, artifact: Location, folder: Path) -> Iterator[Server]:
    """A server of `artifact`, ready for requests during the block. Raises StageError where it does not get ready.

    Its options and its log are serve.yaml and serve.log in `folder`.
    """
    port, key = _free_port(), secrets.token_urlsafe(32)
    keys = {"MQWEN_API_KEYS": hashlib.sha256(key.encode()).hexdigest()}
    arguments = {"checkpoint": str(artifact), "name": "demo", "max_replicas": 2}
    application = {"name": "demo", "import_path": "serve.app:build", "route_prefix": "/", "args": arguments}
    application["runtime_env"] = {"env_vars": keys}
    config = {"http_options": {"host": HOST, "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")]
    log = folder / "serve.log"
    server = Server(f"http://{HOST}:{port}", key, "demo")
    with log.open("w") as output, stages.running(command, output) as process:
        try:
            _wait_until_ready(server, process)
        except StageError as error:
            raise StageError(f"{error}. It said:\n{log.read_text()[-2000:]}") from error
        yield server


def _wait_until_ready(server: Server, process: subprocess.Popen) -> None:
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise StageError(f"serve run ended with exit code {process.returncode} before it was ready")
        try:
            if httpx.get(f"{server.url}/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise StageError(f"{server.url} was not ready after {START_LIMIT:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
