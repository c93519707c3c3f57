"""A client process of several replicas: conversations of a few turns by OpenAI's client, one after the other."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from dataclasses import dataclass
from typing import Any

TURNS = 3


@dataclass
class Asked:
    """Of answers that came while it was measured. `busy` is the share of a core that this process took."""

    tokens: int = 0
    answers: int = 0
    failed: int = 0
    busy: float = 0.0


@dataclass(frozen=True)
class Load:
    """`clients` talk at once from time `begin` on; what they get between `measure` and `end`, by time.time(), counts.
    `words`, of which each question has `length`, and `pictures` (JPEG files) are what conversations are made of."""

    url: str
    key: str
    model: str
    clients: int
    length: int
    out: int
    streamed: bool
    begin: float
    measure: float
    end: float
    words: list[str]
    pictures: list[bytes]


def ask(load: Load, seed: str) -> Asked:
    return asyncio.run(_ask(load, seed))


async def _ask(load: Load, seed: str) -> Asked:
    import openai

    asked = Asked()
    async with openai.AsyncOpenAI(base_url=f"{load.url}/v1", api_key=load.key, max_retries=0, timeout=120) as client:
        await client.models.list()  # a connection is ready
        await asyncio.sleep(max(0.0, load.begin - time.time()))
        talks = [asyncio.create_task(_talk(client, load, f"{seed} {i}", asked)) for i in range(load.clients)]
        await asyncio.sleep(max(0.0, load.measure - time.time()))
        began, used = time.perf_counter(), time.process_time()
        await asyncio.sleep(max(0.0, load.end - time.time()))
        asked.busy = (time.process_time() - used) / (time.perf_counter() - began)
        await asyncio.gather(*talks)
    return asked


async def _talk(client: Any, load: Load, seed: str, asked: Asked) -> None:
    draw = random.Random(seed)
    while time.time() < load.end:
        shown = base64.b64encode(draw.choice(load.pictures)).decode()
        messages: list[dict[str, Any]] = []
        for turn in range(TURNS):
            content: list[dict[str, Any]] = [
                {"type": "text", "text": " ".join(draw.choices(load.words, k=load.length))}
            ]
            if not turn:
                content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{shown}"}})
            messages.append({"role": "user", "content": content})
            try:
                text, tokens = await _answer(client, load, messages)
            except Exception as error:  # whatever it is, it is an answer that did not come
                print(f"{type(error).__name__}: {str(error)[:200]}", flush=True)
                asked.failed += 1
                break
            if not load.measure <= time.time() < load.end:
                tokens = 0
            asked.tokens += tokens
            asked.answers += bool(tokens)
            if time.time() >= load.end:
                return
            messages.append({"role": "assistant", "content": text})


async def _answer(client: Any, load: Load, messages: list[dict[str, Any]]) -> tuple[str, int]:
    options = {"model": load.model, "messages": messages, "max_tokens": load.out, "temperature": 0}
    if not load.streamed:
        answer = await client.chat.completions.create(**options)
        return answer.choices[0].message.content or "", answer.usage.completion_tokens
    text, tokens = "", 0
    stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    async for event in stream:
        if event.choices:
            text += event.choices[0].delta.content or ""
        if event.usage:
            tokens = event.usage.completion_tokens
    return text, tokens
