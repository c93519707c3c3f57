"""Clients in numbers: they ask, and note what became of each request."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.engine.tiny import picture
from tests.serve.pictures import data_url, png_header
from tests.serve.running import KEY

PATH = "/v1/chat/completions"


@dataclass
class Outcomes:
    """statuses: of all answers; 0 is a connection that broke. broken: streams that ended with an error.

    codes: of errors, in answers and in streams. left: clients that went before their answer ended. seconds: of each
    whole answer. begun: when those that failed were asked.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return len(self.begun)

    @property
    def ended(self) -> int:
        return sum(self.statuses.values()) + self.broken + self.left


def chat(seed: int, tokens: int = 24, pictures: int = 1) -> dict[str, Any]:
    """A question about pictures that are few in all, so that caches have something to find."""
    shown = [
        {"type": "image_url", "image_url": {"url": data_url(picture((seed + number) % 16))}}
        for number in range(pictures)
    ]
    content = [*shown, {"type": "text", "text": f"Which digit? {seed}"}]
    options = {"max_tokens": tokens, "temperature": 1, "seed": seed, "stream": bool(seed % 2)}
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | options


async def ask(client: httpx.AsyncClient, body: Any, outcomes: Outcomes, leave_after: float | None = None) -> None:
    """Sends one request. leave_after: seconds, after which this client has gone."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(leave_after):
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            async with client.stream("POST", PATH, **content) as response:
                text = (await response.aread()).decode()
    except TimeoutError:
        outcomes.left += 1
        return
    except httpx.HTTPError:
        outcomes.statuses[0] += 1
        outcomes.begun.append(started)
        return
    error = re.search(r'"error": ?\{.*"code": ?"(\w+)"', text)
    if error or response.status_code != 200:
        outcomes.codes[error[1] if error else "not OpenAI's form"] += 1
        outcomes.begun.append(started)
    if error and response.status_code == 200:
        outcomes.broken += 1
        return
    outcomes.statuses[response.status_code] += 1
    if response.status_code == 200:
        outcomes.seconds.append(time.monotonic() - started)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)  # one that waits for others slows all
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as client:
        yield client


async def closed_loop(client: httpx.AsyncClient, clients: int, until: asyncio.Event, tokens: int = 24) -> Outcomes:
    """So many clients, each with its next request as soon as it has its answer."""
    outcomes, number = Outcomes(), iter(range(10**9))

    async def one() -> None:
        while not until.is_set():
            await ask(client, chat(next(number), tokens), outcomes)

    await asyncio.gather(*(one() for _ in range(clients)))
    return outcomes


async def open_loop(client: httpx.AsyncClient, rate: float, seconds: float, outcomes: Outcomes) -> int:
    """`rate` requests a second, come what may: 30 % leave, 5 % are malformed, 5 % hold too large a picture.

    Returns how many were sent.
    """
    rng, tasks, began, sent = random.Random(0), set[asyncio.Task[None]](), time.monotonic(), 0
    bomb = chat(0)
    bomb["messages"][0]["content"][0]["image_url"]["url"] = data_url(png_header(20_000, 20_000))
    while (now := time.monotonic() - began) < seconds:
        for _ in range(int(now * rate) - sent):
            sent += 1
            dice = rng.random()
            body: Any = b'{"model": "tiny", "messages": [' if dice < 0.05 else bomb if dice < 0.1 else chat(sent)
            leaves = rng.uniform(0.01, 1) if 0.1 <= dice < 0.4 else None
            task = asyncio.create_task(ask(client, body, outcomes, leaves))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(0.02)
    await asyncio.gather(*tasks)
    return sent
