"""`serve run CONFIG`, started as a user would, from the repository root, on a Ray of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve

from serve.keys import ENVIRONMENT, hash_key
from tests.scraping import FAST

ROOT = Path(__file__).parents[2]
KEY = "sk-service"


@dataclass
class Service:
    """folder: of its Ray; in the environment of all that it starts. dashboard: where `serve deploy` is answered."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    folder: Path
    config: dict[str, Any]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        models = [one for one in self.config["applications"] if one["import_path"] == "serve.app:build"]
        routes = [one["route_prefix"].rstrip("/") for one in models]
        try:
            return all(httpx.get(f"{self.url}{route}/ready", timeout=10).status_code == 200 for route in routes)
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        def belongs(process: psutil.Process) -> bool:
            try:
                return process.environ().get("RAY_TMPDIR") == str(self.folder)
            except psutil.Error:
                return False

        return [process for process in psutil.process_iter() if belongs(process)]

    def gcs(self) -> str:
        """The address of its Ray."""
        words = [word for process in self.processes() for word in process.cmdline()]
        return next(word for word in words if word.startswith("--gcs-address=")).partition("=")[2]


@contextmanager
def running(
    log: Path, *applications: dict[str, Any], http: dict[str, Any] | None = None, **variables: str
) -> Iterator[Service]:
    """Applications as in a config file, each ready. Options come in a file, because only a file can choose the port."""
    port = (http or {}).get("port") or free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    config = {"http_options": {"host": "127.0.0.1", "port": port} | (http or {}), "applications": list(applications)}
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"} | FAST
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if (editable := os.environ.get("PYTHONPATH")) and str(ROOT) in editable:
        inherited["PYTHONPATH"] = editable  # this checkout's packages are not the installed ones
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(folder / "config.yaml")],
            cwd=ROOT,
            env=inherited | own | {ENVIRONMENT: hash_key(KEY)} | variables,
            stdout=out,
            stderr=out,
        )
    scheme = "https" if "ssl_certfile" in config["http_options"] else "http"
    service = Service(process, f"{scheme}://127.0.0.1:{port}", log, folder, config)
    try:
        deadline = time.monotonic() + 180
        while not service.is_ready():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield service
    finally:
        process.kill()
        for one in service.processes():
            one.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def driving(service: Service) -> Iterator[Executor]:
    """Another driver of the service's cluster, in a process of its own: Ray's threads may end a process with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=join, initargs=(service.gcs(),)) as driver:
            yield driver


def join(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False)


def stats() -> dict[str, int]:
    """Of the application `main`, which has one replica; for such a driver."""
    return serve.get_deployment_handle("ModelReplica", "main").stats.remote().result()


def application(app: str, route: str, **arguments: Any) -> dict[str, Any]:
    return {"name": app, "import_path": "serve.app:build", "route_prefix": route, "args": arguments}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
