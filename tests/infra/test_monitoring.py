"""Dashboards and alerts name metrics that are emitted, and say what to do with commands that exist."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.grafana.make import HERE, dashboard
from infra.grafana.panels import DASHBOARDS
from mqwen.telemetry.catalogue import METRICS
from mqwen.telemetry.metric import Histogram
from mqwen.train.settings import RunSettings
from serve.settings import Settings

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "infra" / "prometheus"
PROMTOOL = ROOT / ".cache" / "debian" / "usr" / "bin" / "promtool"
OURS = {
    f"{metric.exported}{suffix}"
    for metrics in METRICS.values()
    for metric in metrics
    for suffix in (("_bucket", "_count", "_sum") if isinstance(metric, Histogram) else ("",))
}
# What others emit: Ray itself, and NVIDIA's exporter for GPUs.
RAYS = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_object_store_memory",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
}
DCGMS = {"DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_XID_ERRORS"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    panels = [panel for one in DASHBOARDS for row in one.rows.values() for panel in row]
    return [query for panel in panels for query in panel.queries.values()] + [rule["expr"] for rule in rules()]


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|DCGM)_\w+", expression))


@pytest.mark.parametrize("wanted", DASHBOARDS, ids=lambda wanted: wanted.uid)
def test_the_files_are_the_current_ones(wanted: Any) -> None:
    made = dashboard(wanted)
    assert (HERE / f"{wanted.uid}.json").read_text() == made, "python -m infra.grafana.make writes the new ones"
    shown = [panel for panel in json.loads(made)["panels"] if panel["type"] != "row"]
    assert len(shown) == sum(map(len, wanted.rows.values()))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in shown]
    assert len(set(places)) == len(places)


def test_every_metric_named_is_emitted() -> None:
    used = {name for expression in expressions() for name in names(expression)}
    assert used - OURS - RAYS - DCGMS == set()
    assert used >= RAYS | DCGMS


def test_every_metric_emitted_is_shown() -> None:
    used = {name for expression in expressions() for name in names(expression)}
    missing = [m.exported for ms in METRICS.values() for m in ms if not any(n.startswith(m.exported) for n in used)]
    assert missing == []


def test_each_alert_has_its_paragraph_and_its_test() -> None:
    alerts = [rule["alert"] for rule in rules()]
    assert re.findall(r"^## (\w+)$", (PROMETHEUS / "RUNBOOK.md").read_text(), re.M) == alerts
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    checked = {c["alertname"] for t in tests for c in t["alert_rule_test"] if c.get("exp_alerts")}
    silent = {c["alertname"] for t in tests for c in t["alert_rule_test"] if not c.get("exp_alerts")}
    assert checked == silent == set(alerts)


def test_the_runbooks_commands_exist() -> None:
    """Jobs with their options, Ray's and Serve's commands, a run's options, and settings of serving."""
    from ray.scripts.scripts import cli as ray_cli
    from ray.serve.scripts import cli as serve_cli

    text = (PROMETHEUS / "RUNBOOK.md").read_text()
    used = re.findall(r"\.venv/bin/(\w+) ([\w./-]+)([^`]*)`", text)
    assert {program for program, _, _ in used} == {"python", "ray", "serve"}
    for program, command, options in used:
        if program == "python":
            source = (ROOT / command).read_text()
            for option in re.findall(r"--([\w.-]+)", options):
                assert option.replace("-", "_").rpartition(".")[2] in source, (command, option)
        else:
            known = ray_cli if program == "ray" else serve_cli
            assert command in known.list_commands(None), command
    options = known_options(RunSettings)
    for option in re.findall(r"`--([\w.-]+)[^`]*`", text):
        assert option in options, option
    for setting in re.findall(r"`(max_\w+|min_\w+)`", text):
        assert setting in Settings.model_fields, setting


def known_options(settings: type, prefix: str = "") -> set[str]:
    """As tyro names them."""
    found = set()
    for field in dataclasses.fields(settings):
        name = prefix + field.name.replace("_", "-")
        default = field.default_factory if callable(field.default_factory) else None
        found |= known_options(default, f"{name}.") if dataclasses.is_dataclass(default) else {name}
    return found


def promtool(*words: str) -> str:
    if not PROMTOOL.exists():
        pytest.skip("`make prometheus` brings promtool")
    done = subprocess.run([PROMTOOL, *words], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_alerts_fire_where_they_should() -> None:
    assert "SUCCESS" in promtool("check", "rules", "alerts.yaml")
    promtool("test", "rules", "alerts_test.yaml")


def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    """As rules: promtool parses each. Grafana's own variable stands for a duration."""
    made = [one.replace("$__rate_interval", "1m") for one in expressions()]
    recorded = [{"record": f"expression:{number}", "expr": one} for number, one in enumerate(made)]
    file = tmp_path / "expressions.yaml"
    file.write_text(json.dumps({"groups": [{"name": "all", "rules": recorded}]}))
    assert f"{len(made)} rules found" in promtool("check", "rules", str(file))
    recorded[0]["expr"] += ")"
    file.write_text(json.dumps({"groups": [{"name": "all", "rules": recorded}]}))
    with pytest.raises(AssertionError, match="parse error"):
        promtool("check", "rules", str(file))
