"""Is there room for what a command wants to start? Asked before: Ray itself waits for room without an end."""

from __future__ import annotations

import time

import ray

from mqwen.errors import UserError


class ResourcesError(UserError):
    """The cluster has no room for what was asked; the message names both."""


def require(bundle: dict[str, float], count: int, wait: float, what: str, way_out: str, without_gpus: str) -> None:
    """Returns when `count` times `bundle` ({"CPU": 4, "GPU": 1}) is free, each on one node.

    Raises ResourcesError where that is not so within `wait` seconds, in which others may end or the cluster may grow.
    It says `what` had no room and the `way_out`, or how to do `without_gpus` where the cluster has none.
    """
    limit = time.monotonic() + wait
    while (fits := _fits(bundle)) < count or not _free(bundle, count):
        if time.monotonic() >= limit:
            total, free = ray.cluster_resources(), ray.available_resources()
            has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in bundle)
            asked = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            no_gpus = "GPU" in bundle and not total.get("GPU")
            raise ResourcesError(
                f"{count} {what} with {asked} each were asked for; the cluster has {has} on {_alive()} nodes, whose "
                f"sizes fit {fits} of them. {f'Add a node with GPUs; {without_gpus}' if no_gpus else way_out}"
            )
        time.sleep(1)


def _alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _fits(bundle: dict[str, float]) -> int:
    """How many bundles the nodes hold when nothing else runs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(name, 0) // amount for name, amount in bundle.items())) for node in nodes)


def _free(bundle: dict[str, float], count: int) -> bool:
    free = ray.available_resources()
    return all(free.get(name, 0) >= amount * count for name, amount in bundle.items())
