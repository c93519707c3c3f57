"""Every metric is declared once, well named, in the table, and emitted somewhere with the labels that it has."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from mqwen.telemetry.catalogue import AREAS, METRICS, table
from mqwen.telemetry.metric import Counter, Gauge, Histogram, Metric, _Keeper
from tests.test_structure import imports

ROOT = Path(__file__).parents[2]
TELEMETRY = ROOT / "platform" / "mqwen" / "telemetry"
ALL = [metric for metrics in METRICS.values() for metric in metrics]
EMIT = {Counter: {"add"}, Gauge: {"set", "follow"}, Histogram: {"observe"}}


def test_the_table_is_the_current_one() -> None:
    assert (TELEMETRY / "METRICS.md").read_text() == table(), "python -m mqwen.telemetry prints the new one"


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_metric_is_well_declared(metric: Metric) -> None:
    assert [other.name for other in ALL].count(metric.name) == 1
    assert metric.name.startswith("mqwen_")
    assert metric.name.endswith(metric.unit)
    assert not metric.name.endswith("_total")  # it comes by itself
    assert metric.help.endswith(".")
    assert len(set(metric.labels)) == len(metric.labels)
    if isinstance(metric, Histogram):
        assert metric.buckets[0] > 0
        assert all(a < b for a, b in pairwise(metric.buckets))


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("platform", "serve", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            yield file, ast.parse(file.read_text())


def emissions() -> Iterator[tuple[Path, ModuleType, str, ast.Call]]:
    """Every call on what looks like a metric of an area: file, area, the metric's name in the code, call."""
    areas = {area.__name__.rsplit(".", 1)[-1]: area for area in AREAS}
    for file, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id=area), attr=name))):
                    if area in areas and name.isupper():
                        yield file, areas[area], name, node


def test_each_emission_is_of_a_declared_metric_with_its_labels() -> None:
    for file, area, name, call in emissions():
        metric = getattr(area, name)
        where = f"{file}:{call.lineno}"
        assert isinstance(metric, Metric), where
        assert isinstance(call.func, ast.Attribute)
        assert call.func.attr in EMIT[type(metric)], where
        assert {keyword.arg for keyword in call.keywords} == set(metric.labels), where


def test_each_metric_is_emitted() -> None:
    emitted = defaultdict(set)
    for _, area, name, _ in emissions():
        emitted[area].add(getattr(area, name).name)
    for area in AREAS:
        assert emitted[area] == {metric.name for metric in METRICS[area]}


class Told:
    """In the place of Ray's gauge, which would need a cluster."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values.append(value)


def test_a_gauge_that_cannot_be_told_does_not_end_the_others() -> None:
    keeper, first, second = _Keeper(), Told(), Told()
    keeper._gauges = {(first, frozenset()): lambda: 1 / 0, (second, frozenset()): lambda: 2.0}
    keeper.set_all()
    keeper.set_all()
    assert (first.values, second.values) == ([], [2.0, 2.0])


def test_nothing_else_emits() -> None:
    found = {
        file
        for file, _ in sources()
        for module in imports(file)
        if f"{module}.".startswith(("ray.util.metrics.", "ray.serve.metrics."))
    }
    assert found == {TELEMETRY / "metric.py"}
