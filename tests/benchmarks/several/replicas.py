"""The service with one replica a GPU, and clients in other processes that talk to it in conversations."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from PIL import Image

from mqwen.model.artifact import open_artifact
from tests.benchmarks.h200.served import KEY, NAME, Service, running
from tests.benchmarks.several.client import TURNS, Load, ask
from tests.benchmarks.several.place import Place
from tests.benchmarks.several.report import Case

READY = 3.0  # seconds in which all client processes are at work
PICTURES = 64


@dataclass(frozen=True)
class Talk:
    """Per replica, `clients` talk at once from `processes`; each question has `length` words, each answer `out` tokens.
    Seconds of warming up and of measuring."""

    clients: int = 64
    processes: int = 8
    length: int = 64
    out: int = 256
    warm: float = 4.0
    measured: float = 10.0

    @classmethod
    def tiny(cls) -> Talk:
        return cls(clients=4, processes=1, length=8, out=8, warm=2.0, measured=4.0)


def serve(place: Place, talk: Talk, count: int) -> Iterator[Case]:
    """Whole answers, and streamed ones."""
    _, processor = open_artifact(place.folder / "artifact")
    texts = [processor.tokenizer.decode([i]) for i in range(min(9000, processor.tokenizer.vocab_size))]
    words = [text.strip() for text in texts if text.strip().isascii() and text.strip().isalpha()]
    pictures = [_picture(processor.image_size, sigma) for sigma in range(20, 20 + PICTURES)]
    options: dict[str, Any] = {"checkpoint": str(place.folder / "artifact"), "name": NAME}
    options |= {"min_replicas": count, "max_replicas": count, "ingress_replicas": count}
    options |= {
        "gpus": int(place.gpus > 0),
        "cpus": 1 if place.gpus else 0.25,
        "max_ongoing_requests": talk.clients * 3 // 2,
    }
    haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"  # Ray's own switch
    processes = talk.processes * count
    with running(options) as service, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        load = Load(
            url=service.url,
            key=KEY,
            model=NAME,
            clients=talk.clients // talk.processes,
            length=talk.length,
            out=talk.out,
            streamed=False,
            begin=0,
            measure=0,
            end=0,
            words=words,
            pictures=pictures,
        )
        list(pool.map(partial(ask, load), ["imports"] * processes))
        for streamed in (False, True):
            case = measure(service, pool, replace(load, streamed=streamed), talk, processes)
            yield {
                "name": f"serve {count}{' streamed' if streamed else ''}{' haproxy' if haproxy else ''}",
                "part": "serve",
                "world_size": count,
                "backend": "ray serve",
                "device": place.about["device"],
                "streamed": streamed,
                "haproxy": haproxy,
                "clients": talk.clients * count,
                "out": talk.out,
                "turns": TURNS,
                **case,
            }


def measure(service: Service, pool: ProcessPoolExecutor, load: Load, talk: Talk, processes: int) -> dict[str, Any]:
    before, begin = service.stats(), time.time() + READY
    load = replace(load, begin=begin, measure=begin + talk.warm, end=begin + talk.warm + talk.measured)
    seeds = [f"{load.streamed} {number}" for number in range(processes)]
    asked = list(pool.map(partial(ask, load), seeds))
    after = service.stats()
    queries, hits, generated = (
        [_sum(each, name) for each in (before, after)] for name in ("prefix_queries", "prefix_hits", "generated_tokens")
    )
    shares = sorted(one["generated_tokens"] for one in after)
    return {
        "tokens_per_s": sum(one.tokens for one in asked) / talk.measured,
        "requests_per_s": sum(one.answers for one in asked) / talk.measured,
        "failed": sum(one.failed for one in asked),
        "prefix_hits": (hits[1] - hits[0]) / max(1, queries[1] - queries[0]),
        "generated": generated[1] - generated[0],
        "least_of_most_replica": shares[0] / max(1, shares[-1]),
        "client_busy": max(one.busy for one in asked),
    }


def _sum(stats: list[dict[str, int]], name: str) -> int:
    return sum(one[name] for one in stats)


def _picture(side: int, sigma: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((side, side), sigma).convert("RGB").save(file, "jpeg")
    return file.getvalue()
