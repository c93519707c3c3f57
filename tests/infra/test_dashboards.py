"""Every expression of dashboards and alerts, asked of Prometheus while training and serving run; every panel drawn."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from infra.grafana.draw import Period, Series, answers, ask, concrete, draw, panels
from tests.conftest import KEYS
from tests.infra.operators import Up
from tests.infra.test_monitoring import DCGMS, names, rules
from tests.infra.working import DASHBOARDS, work
from tests.serve.running import KEY

pytestmark = pytest.mark.soak
# Counters of what did not happen: a counter comes with the first that it counts.
NOTHING_TO_COUNT = {
    "ray_mqwen_data_quarantined_samples_total",
    "ray_mqwen_num_preemptions_total",
    "ray_mqwen_storage_failed_requests_total",
    "ray_mqwen_train_left_out_steps_total",
}


@dataclass(frozen=True)
class Worked:
    up: Up
    said: str
    period: Period
    data: dict[str, dict[str, list[Series]]]  # of each dashboard's panels


@pytest.fixture(scope="module")
def worked(up: Up, moto: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    s3 = {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": moto}
    period, said = work(up, tmp_path_factory.mktemp("work"), s3)
    yield Worked(up, said, period, {one["uid"]: answers(up.prometheus, one, period) for one in DASHBOARDS})


def test_nine_of_ten_panels_show_something(worked: Worked) -> None:
    """The others say whose exporter they need."""
    shown = [panel | {"data": worked.data[one["uid"]][panel["title"]]} for one in DASHBOARDS for panel in panels(one)]
    empty = {panel["title"]: panel.get("description") for panel in shown if not panel["data"]}
    print(f"{sum(bool(panel['data']) for panel in shown)} of {len(shown)} panels show something; not {empty}")
    assert sum(bool(panel["data"]) for panel in shown) >= 0.9 * len(shown)
    assert set(empty.values()) <= {"Needs DCGM's exporter."}


def test_every_metric_named_is_there(worked: Worked) -> None:
    there = set(httpx.get(f"{worked.up.prometheus}/api/v1/label/__name__/values").json()["data"])
    shown = [target["expr"] for one in DASHBOARDS for panel in panels(one) for target in panel["targets"]]
    named = {name for expression in [*shown, *(rule["expr"] for rule in rules())] for name in names(expression)}
    assert named - there - DCGMS <= NOTHING_TO_COUNT
    assert there & DCGMS == set()


def test_prometheus_evaluates_every_alert(worked: Worked) -> None:
    for rule in rules():
        answer = httpx.get(f"{worked.up.prometheus}/api/v1/query", params={"query": rule["expr"]}).json()
        assert answer["status"] == "success", (rule["alert"], answer)
    groups = httpx.get(f"{worked.up.prometheus}/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    with pytest.raises(ValueError, match="parse error"):
        ask(worked.up.prometheus, {"expr": "rate(", "legendFormat": ""}, worked.period)


def test_each_panel_is_drawn(worked: Worked, tmp_path: Path) -> None:
    for one in DASHBOARDS:
        picture = tmp_path / f"{one['uid']}.png"
        picture.write_bytes(draw(one, worked.data[one["uid"]], worked.period))
        with Image.open(picture) as drawn:
            assert drawn.width > 1500
            assert len(drawn.convert("L").getcolors() or []) > 20


def test_no_secret_is_in_a_log(worked: Worked) -> None:
    """Nor in what commands say; the token's turn comes when the cluster ends."""
    assert worked.up.logs_with("step 20")  # so what ran is in the logs
    for secret in (KEYS["AWS_SECRET_ACCESS_KEY"], KEY):
        assert worked.up.logs_with(secret) == []
        assert secret not in worked.said


def test_variables_stand_for_all_values() -> None:
    panel: dict[str, Any] = {"expr": 'rate(a{run=~"$run", model_name=~"$model"}[$__rate_interval])'}
    assert concrete(panel["expr"]) == 'rate(a{run=~".*", model_name=~".*"}[1m])'
    left = [target["expr"] for one in DASHBOARDS for p in panels(one) for target in p["targets"]]
    assert not re.search(r"\$", json.dumps([concrete(one) for one in left]))
