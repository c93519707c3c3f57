"""What happens to a service under load; each run gives a table and the figures that the soak tests hold to limits."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from tests.memory import anonymous_bytes
from tests.scraping import Scrape, discovered, scrape_until
from tests.serve.clients import Outcomes, chat, closed_loop, connected, open_loop
from tests.serve.running import ROOT, Service, application, driving, running, stats

POSITION = 4 * 2 * 128 * 4  # bytes of one in the tiny model's KV cache: layers, keys and values, width, float32
What = Literal["load", "kill", "upgrade", "scale", "routing"]


@dataclass
class Table:
    """rows: what the result's file shows. figures: the same by name, for tests."""

    rows: list[tuple[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, label: str, value: Any) -> None:
        self.rows.append((label, value))
        self.figures[name] = value
        print(f"{label}: {value}", flush=True)

    def markdown(self) -> str:
        return "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in self.rows)


def replicas(app: str = "main", *deployments: str) -> list[dict[str, Any]]:
    """Serve's own words: id, state, pid of each. None at the moment in which an upgrade is taken in."""
    found = serve.context._get_global_client().get_serve_details()["applications"][app]["deployments"]
    return [one for name in deployments or ("ModelReplica",) for one in found.get(name, {}).get("replicas", [])]


def at_work(actor: str) -> int:
    """Requests in a replica."""
    return ray.get(ray.get_actor(actor, namespace="serve").get_num_ongoing_requests.remote())


async def call(driver: Executor, function: Callable[..., Any], *words: Any) -> Any:
    return await asyncio.wrap_future(driver.submit(function, *words))


async def until(
    driver: Executor, condition: Callable[[list[dict[str, Any]]], bool], *words: str, limit: float = 180
) -> float:
    """Seconds until Serve's list of replicas is so. words: whose, as `replicas` takes them."""
    began = time.monotonic()
    async with asyncio.timeout(limit):
        while not condition(await call(driver, replicas, *words)):
            await asyncio.sleep(0.1)
    return time.monotonic() - began


def count_running(found: list[dict[str, Any]]) -> int:
    return sum(one["state"] == "RUNNING" for one in found)


@asynccontextmanager
async def loaded(url: str, clients: int, tokens: int = 24) -> AsyncIterator[asyncio.Task[Outcomes]]:
    """So many clients ask during the block, and end with it."""
    ended = asyncio.Event()
    async with connected(url) as client:
        task = asyncio.create_task(closed_loop(client, clients, ended, tokens))
        try:
            yield task
        finally:
            ended.set()
            await task


def load(artifact: Path, folder: Path, minutes: float) -> Table:
    table = Table()
    options = {"max_queued_requests": 64, "max_ongoing_requests": 32, "max_pixels": 1_000_000}

    def held(service: Service) -> dict[str, float]:
        """MB that the processes have for themselves through which requests go: proxy, ingress, replica."""
        names = ("ray::ServeReplica", "ray::ProxyActor")
        found = {(one.cmdline() or [""])[0].partition(".")[0]: one.pid for one in service.processes()}
        return {name: anonymous_bytes(pid) / (1 << 20) for name, pid in found.items() if name.startswith(names)}

    async def main(service: Service, driver: Executor) -> None:
        async with connected(service.url) as client:
            ended = asyncio.Event()
            task = asyncio.create_task(closed_loop(client, 32, ended))
            await asyncio.sleep(min(20, minutes * 6))
            ended.set()
            capacity = len((await task).seconds) / min(20, minutes * 6)
            outcomes, memory = Outcomes(), list[tuple[float, dict[str, float]]]()
            work = asyncio.create_task(open_loop(client, 1.5 * capacity, minutes * 60, outcomes))
            began = time.monotonic()
            while not work.done():
                memory.append((time.monotonic() - began, await asyncio.to_thread(held, service)))
                await asyncio.wait([work], timeout=minutes)
            sent = await work
        async with asyncio.timeout(60):
            while True:
                found = await call(driver, stats)
                if not (found["running"] or found["waiting"] or found["kv_blocks_used"]):
                    break
                await asyncio.sleep(0.2)
        third = means([held for at, held in memory if minutes * 18 <= at < minutes * 24])
        last = means([held for at, held in memory if at >= minutes * 54])
        table.add("capacity", "capacity, requests/s", round(capacity, 1))
        table.add("minutes", "minutes at 1.5 times that", minutes)
        table.add("sent", "requests sent", sent)
        table.add("statuses", "answers by status", dict(sorted(outcomes.statuses.items())))
        table.add("codes", "errors by code", dict(sorted(outcomes.codes.items())))
        table.add("broken", "streams that broke", outcomes.broken)
        table.add("left", "clients that left", outcomes.left)
        table.add("unknown", "requests of which nothing is known", sent - outcomes.ended)
        table.add("finished", "generations finished", found["finished"])
        table.add("aborted", "generations aborted", found["aborted"])
        table.add("failed", "generations failed", found["failed"])
        for name, held_then in third.items():
            table.add(name, f"anonymous memory of {name}, fourth tenth and last, MB", (held_then, last[name]))
        growth = sum(last.values()) / sum(third.values())
        table.add("growth", "memory, last tenth over the fourth tenth", round(growth, 3))
        table.add("blocks", "KV blocks in use at the end", found["kv_blocks_used"])
        table.add("at_work", "requests at work at the end", found["running"] + found["waiting"])

    arguments = application("main", "/", checkpoint=str(artifact), cpus=0.5, **options)
    with running(folder / "log", arguments) as service, driving(service) as driver:
        asyncio.run(main(service, driver))
    return table


def means(samples: list[dict[str, float]]) -> dict[str, float]:
    """Of each name, which all samples have."""
    return {name: round(statistics.mean(one[name] for one in samples), 1) for name in samples[0]}


def kill(artifact: Path, folder: Path, minutes: float) -> Table:
    """A replica of two is killed under load; so is one of two of an empty application, in the same run."""
    table = Table()
    options = {"min_replicas": 2, "max_replicas": 2, "max_ongoing_requests": 16, "cpus": 0.25}
    empty = {"name": "empty", "import_path": "tests.serve.empty:app", "route_prefix": "/empty"}

    async def main(service: Service, driver: Executor) -> None:
        for app, deployment in (("main", "ModelReplica"), ("empty", "Empty")):
            async with loaded(service.url, 8) as work:
                await asyncio.sleep(5)
                victim = (await call(driver, replicas, app, deployment))[0]
                lost = await call(driver, at_work, victim["actor_name"])
                killed = time.monotonic()
                os.kill(victim["pid"], signal.SIGKILL)
                seconds = await until(
                    driver,
                    lambda found, gone=victim["pid"]: (
                        count_running(found) == 2 and gone not in [one["pid"] for one in found]
                    ),
                    app,
                    deployment,
                )
                await asyncio.sleep(3)
            outcomes = work.result()
            name = "this replica's" if app == "main" else "an empty Serve replica's"
            table.add(f"{app}_seconds", f"from SIGKILL to full strength, {name}, s", round(seconds, 1))
            if app == "main":
                table.add("lost", "requests in that replica, just before", lost)
                table.add("statuses", "answers by status, 8 clients", dict(sorted(outcomes.statuses.items())))
                table.add("broken", "streams that ended with an error", outcomes.broken)
                table.add("codes", "errors by code", dict(outcomes.codes))
                late = sum(one > killed for one in outcomes.begun)
                table.add("late", "of those that failed, asked after the SIGKILL", late)

    arguments = application("main", "/", checkpoint=str(artifact), **options)
    with running(folder / "log", arguments, empty) as service, driving(service) as driver:
        asyncio.run(main(service, driver))
    return table


def upgrade(artifact: Path, folder: Path, minutes: float) -> Table:
    """`serve deploy` of a changed config: two replicas one after the other, and an only one beside the one before."""
    table = Table()
    cases = {
        "two replicas": {"min_replicas": 2, "max_replicas": 2},
        "an only replica": {"max_surge_percent": 100},
    }

    async def main(name: str, arguments: dict[str, Any], service: Service, driver: Executor) -> None:
        client = ServeSubmissionClient(await call(driver, dashboard))
        every = ("main", "ModelReplica", "Ingress", "KeyLimits")
        before = {one["replica_id"] for one in await call(driver, replicas, *every)}
        async with loaded(service.url, 8) as work:
            await asyncio.sleep(5)
            changed = service.config | {"applications": [application("main", "/", **arguments, max_answer=200)]}
            await asyncio.to_thread(client.deploy_applications, changed)
            seconds = await until(
                driver,
                lambda found: (
                    len(found) == count_running(found) == len(before)
                    and not before & {one["replica_id"] for one in found}
                ),
                *every,
            )
            await asyncio.sleep(3)
        outcomes = work.result()
        table.add(f"{name}_seconds", f"{name}: all replaced, ingress too, after, s", round(seconds, 1))
        table.add(f"{name}_answered", f"{name}: requests answered meanwhile, 8 clients", outcomes.statuses[200])
        table.add(f"{name}_failed", f"{name}: requests failed", outcomes.failed)
        table.add(f"{name}_codes", f"{name}: errors by code", dict(outcomes.codes))
        table.add(f"{name}_longest", f"{name}: longest answer, s", round(max(outcomes.seconds), 1))

    # What is deployed later is imported by the cluster's own processes, not by `serve run`.
    path = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    for name, options in cases.items():
        arguments = {"cpus": 0.25, "checkpoint": str(artifact), "key_concurrency": 100} | options
        application_before = application("main", "/", **arguments)
        with running(folder / "log", application_before, **path) as service, driving(service) as driver:
            asyncio.run(main(name, arguments, service, driver))
    return table


def dashboard() -> str:
    return f"http://{ray._private.worker.global_worker.node.webui_url}"


def scale(artifact: Path, folder: Path, minutes: float) -> Table:
    """One replica, three, and one again: for many requests, and for few that fill the KV cache."""
    table = Table()
    shared = {"max_replicas": 3, "upscale_delay": 2, "downscale_delay": 10, "cpus": 0.25}
    room = 800 * POSITION
    cases = {"requests": {"max_ongoing_requests": 8}, "cache": {"max_ongoing_requests": 64, "kv_cache_bytes": room}}
    seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in cases}  # seconds, running replicas, clients

    async def main(name: str, service: Service, driver: Executor) -> None:
        await call(driver, replicas)  # the driver has started
        began, clients = time.monotonic(), 2

        async def watch() -> None:
            while True:
                running = count_running(await call(driver, replicas))
                seen[name].append((time.monotonic() - began, running, clients))
                await asyncio.sleep(0.3)

        watching = asyncio.create_task(watch())
        async with loaded(service.url, 2) as few:
            await asyncio.sleep(8)
            clients = 18
            async with loaded(service.url, 16, 100) as many:
                up = await until(driver, lambda found: count_running(found) == 3)
                await asyncio.sleep(8)
            clients = 2
            down = await until(driver, lambda found: len(found) == 1)
        watching.cancel()
        both = [few.result(), many.result()]
        counts = [count for _, count, _ in seen[name]]
        changes = [count for before, count in pairwise([0, *counts]) if before != count]
        by = f"by {name}"
        table.add(f"{name}_up", f"{by}: from the load step to three replicas, s", round(up, 1))
        table.add(f"{name}_down", f"{by}: from its end to one replica, s", round(down, 1))
        table.add(f"{name}_counts", f"{by}: replicas, one after the other", " ".join(map(str, changes)))
        table.add(f"{name}_answered", f"{by}: requests answered", sum(one.statuses[200] for one in both))
        table.add(f"{name}_failed", f"{by}: requests failed", sum(one.failed for one in both))

    for name, options in cases.items():
        arguments = application("main", "/", checkpoint=str(artifact), **shared, **options)
        with running(folder / "log", arguments) as service, driving(service) as driver:
            asyncio.run(main(name, service, driver))
    plot(seen, folder / "service-scale.png")
    return table


def plot(seen: dict[str, list[tuple[float, int, int]]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, every = plt.subplots(1, len(seen), figsize=(6 * len(seen), 3), sharey=True)
    for axes, (name, points) in zip(every, seen.items(), strict=True):
        seconds, counts, clients = zip(*points, strict=True)
        axes.step(seconds, counts, where="post", label="replicas")
        axes.step(seconds, [one / 6 for one in clients], where="post", label="clients / 6", linestyle=":")
        axes.set(xlabel="seconds", yticks=[0, 1, 2, 3], title=f"Replicas under a load step, by {name}")
        axes.legend()
    figure.savefig(file, dpi=110, bbox_inches="tight")


def routing(artifact: Path, folder: Path, minutes: float) -> Table:
    """24 conversations of five turns, each turn with a picture, over three replicas, by affinity and at random; and
    over one, which has all that was before: the ceiling."""
    table = Table()
    options = {"max_ongoing_requests": 16, "cpus": 0.2}

    async def converse(client: Any, number: int, outcomes: Outcomes) -> None:
        messages: list[Any] = []
        for turn in range(5):
            messages += chat(1000 * number + turn)["messages"]
            messages[-1]["content"][0] = chat(number * 5 + turn)["messages"][0]["content"][0]
            body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
            response = await client.post("/v1/chat/completions", json=body)
            outcomes.statuses[response.status_code] += 1
            messages.append({"role": "assistant", "content": response.json()["choices"][0]["message"]["content"]})

    async def main(service: Service) -> None:
        outcomes = Outcomes()
        async with connected(service.url) as client:
            for first in range(0, 24, 6):
                await asyncio.gather(*(converse(client, first + number, outcomes) for number in range(6)))
        assert outcomes.statuses == {200: 120}

    def totals(found: Scrape) -> dict[str, float]:
        names = ("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits", "request_success")
        return {name: found.total(f"ray_mqwen_{name}_total", model_name="tiny") for name in names}

    for way, count in (("affinity", 3), ("random", 3), ("one replica", 1)):
        number = {"min_replicas": count, "max_replicas": count, "routing": "random" if way == "random" else "affinity"}
        arguments = application("main", "/", checkpoint=str(artifact), **number, **options)
        with running(folder / "log", arguments) as service:
            asyncio.run(main(service))
            addresses = discovered(service.folder)
            found = totals(scrape_until(addresses, lambda found: totals(found)["request_success"] == 120))
        share = found["prefix_cache_hits"] / found["prefix_cache_queries"]
        encoded = found["mm_cache_queries"] - found["mm_cache_hits"]
        table.add(f"{way}_prefix", f"{way}: positions of prompts found in the prefix cache", f"{share:.1%}")
        table.add(f"{way}_encoded", f"{way}: pictures encoded", round(encoded))
        table.figures[way] = share
    return table


RUNS: dict[str, Callable[[Path, Path, float], Table]] = {
    "load": load,
    "kill": kill,
    "upgrade": upgrade,
    "scale": scale,
    "routing": routing,
}
