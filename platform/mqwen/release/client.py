"""Chats asked over HTTP, as clients ask them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from mqwen.release.errors import ReleaseError

AT_ONCE = 16  # requests under way
TIMEOUT = 60.0  # seconds for one answer
CHECK_TIMEOUT = 10.0  # seconds for an answer that no model is needed for
TRIES = 5  # where a server is too busy for a question
MAX_WAIT = 30.0  # seconds between them
BUSY = (429, 503)


@dataclass(frozen=True)
class Server:
    """`url` is what /v1 follows, `key` what clients send (it may be empty), `model` the name that they ask for."""

    url: str
    key: str
    model: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def check(server: Server) -> None:
    """Raises ReleaseError where the server does not answer to this key."""
    try:
        response = httpx.get(f"{server.url}/v1/models", headers=server.headers, timeout=CHECK_TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReleaseError(
            f"--service.url: the live model does not answer at {server.url} ({type(error).__name__}: {error})"
        ) from error
    if response.status_code in (401, 403):
        raise ReleaseError(f"MQWEN_API_KEY is no key of the live model at {server.url} ({response.status_code})")
    if not response.is_success and response.status_code not in BUSY:
        raise ReleaseError(f"--service.url: {server.url} answers {response.status_code} to GET /v1/models")


@dataclass(frozen=True)
class Chat:
    """`messages` as `mqwen.model.chat` takes them, with `pictures` (files' bytes) in the order of their image parts."""

    messages: Sequence[dict[str, Any]]
    pictures: Sequence[bytes]


@dataclass(frozen=True)
class Reply:
    """`error` is why there is no text, or ""."""

    text: str = ""
    seconds: float = 0.0
    error: str = ""


def ask(
    server: Server, chats: Sequence[Chat], max_tokens: int, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[Reply]:
    """The greedy answer to each chat; `progress` is told how many came of how many."""

    async def ask_all() -> list[Reply]:
        gate, done = asyncio.Semaphore(AT_ONCE), 0
        async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=TIMEOUT) as client:

            async def ask_one(chat: Chat) -> Reply:
                nonlocal done
                body = {"model": server.model, "messages": _spoken(chat), "max_tokens": max_tokens, "temperature": 0}
                async with gate:
                    started = time.perf_counter()
                    try:
                        response = await client.post("/v1/chat/completions", json=body)
                        for _ in range(TRIES - 1):
                            if response.status_code not in BUSY:
                                break
                            await asyncio.sleep(_wait(response))
                            started = time.perf_counter()
                            response = await client.post("/v1/chat/completions", json=body)
                        response.raise_for_status()
                        text = response.json()["choices"][0]["message"]["content"]
                        if not isinstance(text, str):
                            raise TypeError(f"the answer's content is {text!r}")
                        reply = Reply(text, time.perf_counter() - started)
                    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:  # JSON of another form too
                        reply = Reply(error=f"{type(error).__name__}: {error}".splitlines()[0])
                done += 1
                progress(done, len(chats))
                return reply

            return list(await asyncio.gather(*map(ask_one, chats)))

    return asyncio.run(ask_all())


def _wait(response: httpx.Response) -> float:
    """Seconds that a busy server asks for; a second where it names none, or a date."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), MAX_WAIT) if said.isdecimal() else 1.0


def _spoken(chat: Chat) -> list[dict[str, Any]]:
    """The messages in OpenAI's form."""
    waiting = iter(chat.pictures)

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] != "image":
            return {"type": "text", "text": one["text"]}
        data = base64.b64encode(next(waiting)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/unknown;base64,{data}"}}

    return [
        {"role": message["role"], "content": content if isinstance(content, str) else list(map(part, content))}
        for message in chat.messages
        for content in [message["content"]]
    ]
