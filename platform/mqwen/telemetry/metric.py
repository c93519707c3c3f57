"""A metric: its name, unit, labels and help, and the one way to emit it.

Values go through Ray to the metrics endpoint of their node, where Prometheus finds them. A process that is in no Ray
cluster emits nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

KEEP = 1.0  # seconds; Ray reports once a second at most


@dataclass(frozen=True)
class Metric:
    """`unit` is what the name ends with, or "" for a plain number. Every emission gives each of `labels` a value."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    @property
    def exported(self) -> str:
        """The name under which Prometheus has it; a histogram's series add _bucket, _sum and _count."""
        return f"ray_{self.name}"

    def _make(self) -> Any:
        """Ray's metric of the kind."""
        raise NotImplementedError

    def _ray(self) -> Any | None:
        """Ray's metric, made when it is first wanted; None where there is no cluster."""
        if not _in_cluster():
            return None
        if self.name not in _made:
            _made[self.name] = self._make()
        return _made[self.name]


def _in_cluster() -> bool:
    """Ray is not imported for this: who has not done it is in no cluster, and may have no Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


class Counter(Metric):
    """Only grows. Ask for its rate."""

    @property
    def exported(self) -> str:
        return f"ray_{self.name}_total"

    def add(self, value: float = 1, **labels: str) -> None:
        if value and (counter := self._ray()):  # Ray refuses to add nothing
            counter.inc(value, labels)

    def _make(self) -> Any:
        from ray.util import metrics

        return metrics.Counter(self.name, self.help, self.labels)


class Gauge(Metric):
    """What was set last, as long as the process lives."""

    def set(self, value: float, **labels: str) -> None:
        self.follow(lambda: value, **labels)

    def follow(self, value: Callable[[], float], **labels: str) -> Callable[[], None]:
        """Sets what `value` gives, once a second from now on, until what this returns is called; another value that
        took its place stays."""
        if gauge := self._ray():
            _keeper.keep(gauge, value, labels)
            return lambda: _keeper.drop(gauge, value, labels)
        return lambda: None

    def _make(self) -> Any:
        from ray.util import metrics

        return metrics.Gauge(self.name, self.help, self.labels)


@dataclass(frozen=True)
class Histogram(Metric):
    """Counts by size. Counts and quantiles are right up to the buckets; the sum is Ray's guess from the buckets."""

    buckets: tuple[float, ...] = ()

    def observe(self, value: float, **labels: str) -> None:
        if histogram := self._ray():
            histogram.observe(value, labels)

    def _make(self) -> Any:
        from ray.util import metrics

        return metrics.Histogram(self.name, self.help, list(self.buckets), self.labels)


class _Keeper:
    """Sets each gauge again and again: Ray drops one that was not set for two of its report intervals.

    With the process this ends, so that the gauges of a process that is gone leave by themselves.
    """

    def __init__(self) -> None:
        self._gauges: dict[tuple[Any, frozenset[tuple[str, str]]], Callable[[], float]] = {}
        self._lock = threading.Lock()  # so that no older value is set after a newer one
        self._thread: threading.Thread | None = None

    def keep(self, gauge: Any, value: Callable[[], float], labels: dict[str, str]) -> None:
        with self._lock:
            self._gauges[gauge, frozenset(labels.items())] = value
            gauge.set(value(), labels)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)
                self._thread.start()

    def drop(self, gauge: Any, value: Callable[[], float], labels: dict[str, str]) -> None:
        key = gauge, frozenset(labels.items())
        with self._lock:
            if self._gauges.get(key) is value:
                del self._gauges[key]

    def _run(self) -> None:
        while True:
            time.sleep(KEEP)
            if _in_cluster():
                self.set_all()

    def set_all(self) -> None:
        with self._lock:
            for (gauge, labels), value in self._gauges.items():
                with suppress(Exception):  # one that cannot be told now shall not end the others
                    gauge.set(value(), dict(labels))


_made: dict[str, Any] = {}
_keeper = _Keeper()
