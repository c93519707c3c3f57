"""A cluster's metrics as Prometheus gets them: from the addresses that Ray writes for it, by HTTP, with its parser."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

# Ray reports each ten seconds, if it is not told otherwise; a second is its least.
FAST = {"RAY_metrics_report_interval_ms": "1000"}
LIMIT = 60  # seconds that a value may take to arrive


class Scrape:
    """What all targets gave at one moment."""

    def __init__(self, families: list[Family]) -> None:
        self.families = {family.name: family for family in families}

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of the series of that name that have these labels."""
        samples = [sample for family in self.families.values() for sample in family.samples]
        return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        return sum(self.values(name, **labels))


def scrape(ray_folder: Path) -> Scrape:
    """`ray_folder` is the cluster's RAY_TMPDIR."""
    found = json.loads((ray_folder / "ray" / "prom_metrics_service_discovery.json").read_text())
    families = []
    for target in (target for group in found for target in group["targets"]):
        response = httpx.get(f"http://{target}/metrics").raise_for_status()
        families += [one for one in text_string_to_metric_families(response.text) if "mqwen" in one.name]
    return Scrape(families)


def scrape_until(ray_folder: Path, condition: Callable[[Scrape], bool]) -> Scrape:
    deadline = time.monotonic() + LIMIT
    while not condition(found := scrape(ray_folder)):
        assert time.monotonic() < deadline, {name: family.samples for name, family in found.families.items()}
        time.sleep(0.2)
    return found


@contextmanager
def scraped_meanwhile(ray_folder: Path) -> Iterator[list[Scrape]]:
    """Scrapes again and again while the block runs, as gauges are there only as long as who sets them."""
    found: list[Scrape] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.5):
            with suppress(OSError, httpx.TransportError):  # the addresses come some seconds after the cluster
                found.append(scrape(ray_folder))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
