"""A cluster's metrics as Prometheus gets them: by HTTP from each node, read by its client's parser."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import httpx
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from mqwen.telemetry.catalogue import METRICS

# Ray reports each ten seconds, if it is not told otherwise; a second is its least.
FAST = {"RAY_metrics_report_interval_ms": "1000"}
LIMIT = 60  # seconds that addresses or a value may take to come


def discovered(ray_folder: Path) -> list[str]:
    """The addresses that Ray writes for Prometheus. `ray_folder` is the cluster's RAY_TMPDIR."""
    file, deadline = ray_folder / "ray" / "prom_metrics_service_discovery.json", time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.1)
    return [target for group in json.loads(file.read_text()) for target in group["targets"]]


class Scrape:
    """Our metrics at all addresses at one moment."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def declared(self) -> set[tuple[str, str, str]]:
        """Names, kinds and help, as `declared` below has them."""
        return {(family.name, family.type, family.documentation) for family in self._families}

    def values(self, name: str, least: float = 0, **labels: str) -> list[float]:
        """The values of the series of that name with these labels; of buckets those from `least` on."""
        samples = [sample for family in self._families for sample in family.samples]
        found = [one for one in samples if one.name == name and labels.items() <= one.labels.items()]
        return [one.value for one in found if float(one.labels.get("le", "inf")) >= least]

    def total(self, name: str, least: float = 0, **labels: str) -> float:
        return sum(self.values(name, least, **labels))


def declared(area: ModuleType) -> set[tuple[str, str, str]]:
    """An area's metrics, as the parser names them: it takes a counter's _total away."""
    return {(metric.exported.removesuffix("_total"), metric.kind, metric.help) for metric in METRICS[area]}


def scrape(addresses: list[str]) -> Scrape:
    families = []
    for address in addresses:
        with suppress(httpx.TransportError):  # Ray names an autoscaler's address, which no one serves here
            text = httpx.get(f"http://{address}/metrics").raise_for_status().text
            ours = "\n".join(line for line in text.splitlines() if "ray_mqwen_" in line)  # parsing all takes long
            families += text_string_to_metric_families(ours)
    return Scrape(families)


def scrape_until(addresses: list[str], condition: Callable[[Scrape], bool]) -> Scrape:
    deadline = time.monotonic() + LIMIT
    while not condition(found := scrape(addresses)):
        assert time.monotonic() < deadline, [family.samples for family in found._families]
        time.sleep(0.2)
    return found


@contextmanager
def scraped_meanwhile(addresses: list[str]) -> Iterator[list[Scrape]]:
    """Scrapes again and again while the block runs: gauges are there only as long as who sets them."""
    found: list[Scrape] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(1):
            found.append(scrape(addresses))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
