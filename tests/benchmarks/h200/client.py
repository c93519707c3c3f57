"""A client process of the service: asks, and notes when tokens come. It imports nothing that takes long."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Answer:
    """sent, times: seconds by time.time(); the latter of each event, the first when the first token was there."""

    sent: float
    times: list[float]
    tokens: int


def ask_all(url: str, key: str, at: float, bodies: list[bytes]) -> list[Answer]:
    """All at once, at a time by time.time()."""
    return asyncio.run(_ask_all(url, key, at, bodies))


async def _ask_all(url: str, key: str, at: float, bodies: list[bytes]) -> list[Answer]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as client:
        if bodies:
            (await client.get("/health")).raise_for_status()  # httpx and a connection are ready
        await asyncio.sleep(max(0.0, at - time.time()))
        return list(await asyncio.gather(*(_ask(client, body) for body in bodies)))


async def _ask(client: httpx.AsyncClient, body: bytes) -> Answer:
    sent, times, last = time.time(), [], ""
    async with client.stream("POST", "/v1/chat/completions", content=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.time())
                last = line
    usage = json.loads(last.removeprefix("data: ")).get("usage")
    if not usage:
        raise RuntimeError(f"an answer ended with {last}")
    return Answer(sent, times, usage["completion_tokens"])
