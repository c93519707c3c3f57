"""What `make cluster` starts: scraped, its alerts loaded, closed to who has no token, and gone afterwards."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from infra.cluster import PROMETHEUS, ROOT

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not PROMETHEUS.exists(), reason="`make prometheus` brings it")]


@dataclass(frozen=True)
class Up:
    folder: Path
    address: str
    dashboard: str
    prometheus: str

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()


def command(word: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "infra.cluster", word, str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("operators") / "cluster"
    before = {process.pid for process in psutil.process_iter()}
    done = command("up", folder)
    assert done.returncode == 0, done.stderr
    address = re.search(r"RAY_ADDRESS=(\S+)", done.stdout)
    urls = re.findall(r"http://\S+", done.stdout)
    assert address is not None
    found = Up(folder, address[1], *urls)
    token = found.token
    assert token not in done.stdout
    try:
        yield found
        for log in folder.glob("*.log"):
            assert token not in log.read_text()
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


def test_it_is_not_started_twice(up: Up) -> None:
    again = command("up", up.folder)
    assert again.returncode == 1
    assert "make cluster-down ends it" in again.stderr


def test_who_has_no_token_is_refused(up: Up) -> None:
    known = {"Authorization": f"Bearer {up.token}"}
    for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}):
        assert httpx.post(f"{up.dashboard}/api/jobs/", json={"entrypoint": "true"}, headers=headers).status_code in (
            401,
            403,
        )
        assert httpx.get(f"{up.dashboard}/nodes?view=summary", headers=headers).status_code in (401, 403)
    assert httpx.get(f"{up.dashboard}/nodes?view=summary", headers=known).is_success
    code = f"import ray; ray.init({up.address!r}, logging_level='ERROR'); print('nodes', len(ray.nodes()))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token"
    }
    for token, entered in (("0" * 64, False), (up.token, True)):
        words = [sys.executable, "-c", code]
        client = subprocess.run(
            words, env=plain | {"RAY_AUTH_TOKEN": token}, capture_output=True, text=True, timeout=120
        )
        assert ("nodes 2" in client.stdout) == entered, client.stderr


def test_prometheus_scrapes_both_nodes_and_has_the_alerts(up: Up) -> None:
    limit = time.monotonic() + 90
    while True:
        targets = httpx.get(f"{up.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
        healthy = [one for one in targets if one["health"] == "up"]
        if len(healthy) >= 2:
            break
        assert time.monotonic() < limit, targets
        time.sleep(1)
    groups = httpx.get(f"{up.prometheus}/api/v1/rules").json()["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == 15
    assert [rule["name"] for rule in found if rule.get("lastError")] == []
