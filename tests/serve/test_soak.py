"""The service for minutes: above its capacity, with replicas killed, replaced, added and taken away."""

import os
from pathlib import Path

import pytest

from tests.serve import soaking
from tests.serve.soaking import Table

MINUTES = float(os.environ.get("MQWEN_SOAK_MINUTES", "10"))
pytestmark = [pytest.mark.soak, pytest.mark.timeout(60 * MINUTES + 600)]


def run(what: str, artifact: Path, tmp_path: Path) -> Table:
    return soaking.RUNS[what](artifact, tmp_path, MINUTES)


def test_above_capacity_nothing_is_lost_and_nothing_grows(artifact: Path, tmp_path: Path) -> None:
    figures = run("load", artifact, tmp_path).figures
    assert set(figures["statuses"]) <= {200, 400, 429, 503}, figures
    assert {"invalid_json", "invalid_image"} <= set(figures["codes"]) <= {"invalid_json", "invalid_image", "queue_full"}
    assert figures["left"] > 0
    assert figures["aborted"] > 0
    assert figures["unknown"] == figures["broken"] == 0
    assert figures["failed"] == figures["blocks"] == figures["at_work"] == 0
    assert 0.95 <= figures["growth"] <= 1.05, figures


def test_a_killed_replica_costs_only_what_it_had(artifact: Path, tmp_path: Path) -> None:
    figures = run("kill", artifact, tmp_path).figures
    assert set(figures["statuses"]) <= {200, 503}, figures
    assert set(figures["codes"]) <= {"replica_gone"}, figures
    assert figures["statuses"].get(503, 0) + figures["broken"] <= 8  # as many as there are clients
    assert figures["late"] == 0, figures


def test_an_upgrade_costs_nothing(artifact: Path, tmp_path: Path) -> None:
    figures = run("upgrade", artifact, tmp_path).figures
    for name in ("two replicas", "an only replica"):
        assert figures[f"{name}_failed"] == 0, figures
        assert figures[f"{name}_answered"] > 20


def test_one_replica_becomes_three_and_one_again(artifact: Path, tmp_path: Path) -> None:
    figures = run("scale", artifact, tmp_path).figures
    for name in ("requests", "cache"):
        assert figures[f"{name}_failed"] == 0, figures
        assert figures[f"{name}_counts"].startswith("1 ")
        assert figures[f"{name}_counts"].endswith(" 1")
    assert (tmp_path / "service-scale.png").stat().st_size > 5000


def test_a_conversation_finds_its_prefix(artifact: Path, tmp_path: Path) -> None:
    figures = run("routing", artifact, tmp_path).figures
    assert figures["random"] + 0.1 < figures["affinity"] <= figures["one replica"] + 0.01, figures
