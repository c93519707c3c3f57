"""The cluster that `make cluster` starts, as a test has it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.cluster import ROOT


@dataclass(frozen=True)
class Up:
    folder: Path
    address: str
    client: str
    dashboard: str
    prometheus: str

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def environment(self, **more: str) -> dict[str, str]:
        """Of a command that knows the cluster, and its token if `more` does not take it away."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        known = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return {name: value for name, value in (inherited | known | more).items() if value}

    def logs_with(self, secret: str) -> list[Path]:
        """Of this cluster's parts, and of all of Ray's processes, workers and jobs."""
        ray_folder = Path(json.loads((self.folder / "processes.json").read_text())["ray_folder"])
        rays = [file for file in ray_folder.glob("ray/session_*/logs/**/*") if file.is_file()]
        assert rays
        return [log for log in [*self.folder.glob("*.log"), *rays] if secret.encode() in log.read_bytes()]


def command(word: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "infra.cluster", word, str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


@contextmanager
def started(folder: Path) -> Iterator[Up]:
    """Its token is in no log, and nothing of it is left when it was ended."""
    before = {process.pid for process in psutil.process_iter()}
    done = command("up", folder)
    assert done.returncode == 0, done.stderr
    address, client = (re.search(rf"{name}(\S+)", done.stdout) for name in ("RAY_ADDRESS=", "(?=ray://)"))
    assert address is not None
    assert client is not None
    found = Up(folder, address[1], client[1], *re.findall(r"http://\S+", done.stdout)[:2])
    token = found.token
    assert token not in done.stdout
    try:
        yield found
        assert found.logs_with(token) == []
    finally:
        assert command("down", folder).returncode == 0
    assert not folder.exists()
    left = [process for process in psutil.process_iter() if process.pid not in before and holds(process, token)]
    assert left == []


def holds(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get("RAY_AUTH_TOKEN") == token
    except psutil.Error:
        return False
