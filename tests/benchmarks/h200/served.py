"""The service under Ray Serve over HTTP, and the engine alone on the same token ids with a replica's own settings.

As a script it is the service: python -m tests.benchmarks.h200.served PORT OPTIONS, the latter as JSON, as `serve run
serve.app:build` has them; it runs until its input ends, and answers each line of it with what its replicas' engines
have counted. Ray is without its dashboard, which starts slowly.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tests.benchmarks.h200.client import Answer, ask_all

if TYPE_CHECKING:
    from mqwen.engine.engine import Engine
    from mqwen.engine.request import Request
    from mqwen.model import MQWenTokenizer

KEY = "sk-benchmark"
NAME = "served"
CLIENTS = 8  # processes
INGRESSES = 4  # on a card's machine, which has cores for them
ROUNDS = 9  # of one request after the other, where one is asked at once


@dataclass(frozen=True)
class Served:
    """first: ms to the first token, by median and p99. between: ms from one token to the next, by median: those that
    come together share their time."""

    requests: int
    out: int
    tokens_per_s: float
    first: float
    first_p99: float
    between: float

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_s:,.0f} tokens/s, first token {self.first:.1f} ms (p99 {self.first_p99:.1f}), "
            f"between tokens {self.between:.2f} ms"
        )


def conversations(tokenizer: MQWenTokenizer, count: int, seed: str, *, size: int) -> list[tuple[str, bytes]]:
    """Texts of 64 tokens, each a word, and a picture as a JPEG file to each."""
    draw = random.Random(seed)
    texts = [tokenizer.decode([i]) for i in range(1000, 9000)]
    words = [text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    made: list[tuple[str, bytes]] = []
    while len(made) < count:
        text = "".join(draw.choices(words, k=64))
        if len(tokenizer.encode_text(text)) == 64:
            file = io.BytesIO()
            Image.effect_noise((size, size), draw.randrange(20, 90)).convert("RGB").save(file, "jpeg")
            made.append((text, file.getvalue()))
    return made


def as_requests(tokenizer: MQWenTokenizer, asked: list[tuple[str, bytes]], out: int, seed: str) -> list[Request]:
    """What a replica makes of `as_bodies`."""
    from mqwen.engine.request import Request
    from mqwen.model.chat import encode_chat

    def ids(text: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return encode_chat(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True).input_ids

    return [
        Request(f"{seed} {i}", ids(text), [picture], max_tokens=out) for i, (text, picture) in enumerate(asked)
    ]  # fmt: skip


def as_bodies(asked: list[tuple[str, bytes]], out: int) -> list[bytes]:
    def body(text: str, picture: bytes) -> bytes:
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        options = {"max_tokens": out, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"model": NAME, "messages": [{"role": "user", "content": content}]} | options).encode()

    return [body(*one) for one in asked]


def summary(count: int, out: int, rounds: list[list[Answer]]) -> Served:
    """rounds: answers that were asked for at once; what comes before their first is sent is nobody's time."""
    answers = [answer for answers in rounds for answer in answers]
    seconds = [max(one.times[-1] for one in some) - min(one.sent for one in some) for some in rounds]
    tokens = [sum(one.tokens for one in some) for some in rounds]
    first = sorted(1e3 * (one.times[0] - one.sent) for one in answers)
    between = [1e3 * (one.times[-1] - one.times[0]) / (one.tokens - 1) for one in answers if one.tokens > 1]
    rate = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    return Served(
        count, out, rate, statistics.median(first), first[int(0.99 * len(first))], statistics.median(between or [0.0])
    )  # fmt: skip


async def _alone(engine: Engine, requests: list[Request]) -> list[Answer]:
    async def one(request: Request) -> Answer:
        sent, times, tokens = time.time(), [], 0
        async for event in engine.generate(request):
            times.append(time.time())
            tokens = event.completion_tokens
        return Answer(sent, times, tokens)

    return list(await asyncio.gather(*(one(request) for request in requests)))


Draw = Callable[[int, str], list[tuple[str, bytes]]]
"""So many conversations, others for each seed."""


def measure(
    name: str,
    ask: Callable[[list[tuple[str, bytes]], int, str], list[Answer]],
    draw: Draw,
    counts: list[int],
    outs: list[int],
) -> list[Served]:
    """Each count of requests at once; the first round only warms up."""
    found = []
    for count in counts:
        for out in outs:
            seeds = [f"{count} {out} {turn}" for turn in range(1 + (ROUNDS if count == 1 else 2))]
            rounds = [ask(draw(count, seed), out, seed) for seed in seeds]
            found.append(summary(count, out, rounds[1:]))
            print(f"{name}, {count} at once, {out} out: {found[-1]}", flush=True)
    return found


def engine_alone(
    engine: Engine, tokenizer: MQWenTokenizer, draw: Draw, counts: list[int], outs: list[int]
) -> list[Served]:
    def ask(asked: list[tuple[str, bytes]], out: int, seed: str) -> list[Answer]:
        return asyncio.run(_alone(engine, as_requests(tokenizer, asked, out, seed)))

    return measure("engine alone", ask, draw, counts, outs)


def under_serve(artifact: Path, gpus: int, draw: Draw, counts: list[int], outs: list[int]) -> list[Served]:
    """From other processes, by HTTP; through HAProxy where RAY_SERVE_ENABLE_HA_PROXY is 1."""
    options = {"checkpoint": str(artifact), "name": NAME, "gpus": gpus, "routing": "random"}
    options |= {"ingress_replicas": INGRESSES if gpus else 1}
    with (
        running(options) as service,
        ProcessPoolExecutor(CLIENTS, get_context("spawn")) as pool,
    ):
        list(pool.map(partial(ask_all, service.url, KEY, 0.0), [[]] * CLIENTS))  # they are there

        def ask(asked: list[tuple[str, bytes]], out: int, seed: str) -> list[Answer]:
            bodies = as_bodies(asked, out)
            parts = [bodies[place::CLIENTS] for place in range(min(CLIENTS, len(bodies)))]
            done = pool.map(partial(ask_all, service.url, KEY, time.time() + 0.3), parts)
            return [answer for answers in done for answer in answers]

        return measure("Ray Serve", ask, draw, counts, outs)


@dataclass(frozen=True)
class Service:
    url: str
    process: subprocess.Popen[str]

    def stats(self) -> list[dict[str, int]]:
        """Each replica's mqwen.engine.engine.EngineStats."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told = next(line for line in self.process.stdout if line.startswith("stats "))
        return json.loads(told.removeprefix("stats "))


@contextmanager
def running(options: dict[str, Any]) -> Iterator[Service]:
    """The application, when it is ready."""
    from serve.keys import ENVIRONMENT, hash_key

    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="ray-") as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.h200.served", str(port), json.dumps(options)],
            env=os.environ | own | {ENVIRONMENT: hash_key(KEY)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            told = next((line for line in process.stdout if line.startswith("ready")), None)
            assert told is not None, "the service did not start; what it wrote stands above"
            yield Service(f"http://127.0.0.1:{port}", process)
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()  # it holds GPUs
                process.wait()


def main(port: str, options: str) -> None:
    import ray
    from ray import serve

    from serve.app import build

    ray.init(include_dashboard=False, namespace="serve", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build(json.loads(options)), route_prefix="/")
    print("ready", flush=True)
    replicas = serve.get_deployment_handle("ModelReplica", "default")
    for _ in sys.stdin:
        print("stats", json.dumps(replicas.broadcast("stats").results()), flush=True)
    serve.shutdown()
    ray.shutdown()
    os._exit(0)  # the handle's threads would hold the interpreter up


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
