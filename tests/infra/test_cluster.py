"""What `make cluster` starts: scraped, its alerts loaded, closed to who has no token, and gone afterwards."""

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from infra.cluster import ROOT, provision
from tests.infra.operators import Up, command
from tests.infra.test_monitoring import rules

WRONG = "0" * 64


@pytest.mark.soak
def test_it_is_not_started_twice(up: Up) -> None:
    again = command("up", up.folder)
    assert again.returncode == 1
    assert "make cluster-down ends it" in again.stderr


@pytest.mark.soak
@pytest.mark.parametrize("token", ["", WRONG], ids=["no token", "another's token"])
def test_who_has_no_token_reaches_no_dashboard(up: Up, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for path in ("/nodes?view=summary", "/api/jobs/", "/api/serve/applications/", "/api/v0/actors", "/api/v0/logs"):
        assert httpx.get(f"{up.dashboard}{path}", headers=headers).status_code in (401, 403), path
        known = httpx.get(f"{up.dashboard}{path}", headers={"Authorization": f"Bearer {up.token}"})
        assert known.status_code in (200, 400), (path, known.text)  # the logs want to be told of which node
    job = httpx.post(f"{up.dashboard}/api/jobs/", json={"entrypoint": "true"}, headers=headers)
    assert job.status_code in (401, 403)


def run(up: Up, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), cwd=ROOT, env=up.environment(**more), capture_output=True, text=True, timeout=120
    )


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["driver", "Ray's client"])
def test_who_has_no_token_is_no_client(up: Up, kind: str) -> None:
    address = up.address if kind == "driver" else up.client
    code = f"import ray; ray.init({address!r}, logging_level='ERROR'); print('nodes', len(ray.nodes()))"
    known = run(up, sys.executable, "-c", code)
    assert "nodes 2" in known.stdout, known.stderr
    for refused in ({"RAY_AUTH_TOKEN": WRONG}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        unknown = run(up, sys.executable, "-c", code, **refused)
        assert unknown.returncode != 0
        assert "nodes" not in unknown.stdout


@pytest.mark.soak
def test_who_has_no_token_submits_no_job(up: Up, tmp_path: Path) -> None:
    submit = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", up.dashboard, "--", "touch"]
    for number, refused in enumerate(({"RAY_AUTH_TOKEN": WRONG}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""})):
        assert run(up, *submit, tmp_path / str(number), **refused).returncode != 0
    done = run(up, *submit, tmp_path / "known")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["known"]


@pytest.mark.soak
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
    assert len(found) == len(rules())
    assert [rule["name"] for rule in found if rule.get("lastError")] == []


def test_grafana_is_led_to_both_kinds_of_dashboards(tmp_path: Path) -> None:
    """Grafana itself is installed by its own packages alone; here is what it is started with."""
    ray_folder, url = tmp_path / "ray", "http://127.0.0.1:9"
    variables = provision(tmp_path / "grafana", ray_folder, url, 3000)
    assert variables["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    written = Path(variables["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((written / "datasources" / "mqwen.yaml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", url, True)
    shown = yaml.safe_load((written / "dashboards" / "mqwen.yaml").read_text())["providers"]
    ours, rays = (Path(one["options"]["path"]) for one in shown)
    assert len(list(ours.glob("*.json"))) == 4
    assert rays.is_relative_to(ray_folder)
