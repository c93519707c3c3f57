"""Limits of each API key: counted once, wherever its requests come in."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from serve.backend import Served
from serve.guards import Guards
from serve.ingress import Policy, create_app
from serve.keys import hash_key
from serve.limits import KeyLimits, Limits
from serve.task import ChatTask, Chunk, TokenizeTask, Tokens

ASKED = {"model": "slow", "messages": [{"role": "user", "content": "?"}]}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_holds_in_every_minute() -> None:
    clock = Clock()
    limits = KeyLimits(Limits(requests_per_minute=3, concurrency=None, lease=10), clock)

    async def enter(key: str = "a") -> int | None:
        refusal = await limits.enter(key, f"{clock.now}")
        return None if refusal is None else refusal.retry_after

    async def main() -> None:
        for second in (0, 10, 20):
            clock.now = 100 + second
            assert await enter() is None
        assert await enter() == 40  # the first one's minute ends then
        assert await enter("b") is None
        clock.now = 159.5
        assert await enter() == 1
        clock.now = 160
        assert await enter() is None
        assert await enter() == 10

    asyncio.run(main())


def test_requests_at_once_and_those_whose_end_nobody_told() -> None:
    clock = Clock()
    limits = KeyLimits(Limits(requests_per_minute=None, concurrency=2, lease=10), clock)

    async def main() -> None:
        assert await limits.enter("a", "1") is None
        assert await limits.enter("a", "2") is None
        refusal = await limits.enter("a", "3")
        assert refusal is not None
        assert refusal.code == "concurrency_limit_exceeded"
        assert await limits.enter("b", "3") is None
        await limits.leave("a", "1")
        await limits.leave("a", "unknown")
        assert await limits.enter("a", "3") is None
        assert await limits.enter("a", "4") is not None
        clock.now += 10
        assert await limits.enter("a", "4") is None

    asyncio.run(main())


class Slow:
    """A backend that answers when it is let."""

    def __init__(self) -> None:
        self.let, self.ended = asyncio.Event(), 0

    async def generate(self, task: ChatTask) -> AsyncGenerator[Chunk]:
        try:
            await self.let.wait()
            yield Chunk("done", "stop", 1, 1)
        finally:
            self.ended += 1

    async def tokenize(self, task: TokenizeTask) -> Tokens:
        return Tokens([1], 1, 2)

    async def is_ready(self) -> bool:
        return True


def app(slow: Slow, limits: KeyLimits | None, **policy: Any) -> httpx.AsyncClient:
    """An ingress of its own; several may share their limits."""
    hashes = frozenset({hash_key("sk-a"), hash_key("sk-b")})
    own = Policy(key_hashes=hashes, max_body_bytes=1000, max_pictures=1, **policy)
    transport = httpx.ASGITransport(create_app({"slow": Served(slow)}, own, limits))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"Authorization": "Bearer sk-a"})


def check_429(response: httpx.Response, code: str) -> None:
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", code, None)
    assert int(response.headers["retry-after"]) > 0


def test_two_ingresses_and_one_count() -> None:
    async def main() -> None:
        slow, limits = Slow(), KeyLimits(Limits(requests_per_minute=4, concurrency=1, lease=60))
        async with app(slow, limits) as one, app(slow, limits) as other:
            first = asyncio.create_task(one.post("/v1/chat/completions", json=ASKED))
            await asyncio.sleep(0)
            while not limits._running:
                await asyncio.sleep(0)
            check_429(await other.post("/v1/chat/completions", json=ASKED), "concurrency_limit_exceeded")
            slow.let.set()
            assert (await first).status_code == 200
            for client in (other, one, other):
                assert (await client.get("/v1/models")).status_code == 200
            check_429(await other.get("/v1/models"), "rate_limit_exceeded")
            check_429(await one.post("/v1/chat/completions", content=b"{"), "rate_limit_exceeded")
            assert (await one.get("/v1/models", headers={"Authorization": "Bearer sk-b"})).status_code == 200
            assert (await one.get("/health")).status_code == 200
            for header in ({"Authorization": "Bearer sk-c"}, {"Authorization": ""}):  # and nothing is counted for them
                assert (await one.get("/v1/models", headers=header)).status_code == 401

    asyncio.run(main())


def test_an_ingress_has_so_many_requests_at_once_and_no_more() -> None:
    """Whoever they are of; probes are let in, and one that its key's limits refused takes no place."""

    async def main() -> None:
        slow, limits = Slow(), KeyLimits(Limits(requests_per_minute=None, concurrency=2, lease=60))
        async with app(slow, limits, max_requests=3) as client:

            def ask(key: str) -> asyncio.Task[httpx.Response]:
                headers = {"Authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post("/v1/chat/completions", json=ASKED, headers=headers))

            running = [ask("sk-a"), ask("sk-a")]
            check_429(await ask("sk-a"), "concurrency_limit_exceeded")
            running.append(ask("sk-b"))
            check_429(await ask("sk-b"), "queue_full")
            check_429(await client.post("/v1/chat/completions", content=b"{"), "queue_full")
            assert (await client.get("/health")).status_code == 200
            slow.let.set()
            assert [one.status_code for one in await asyncio.gather(*running)] == [200] * 3
            assert (await ask("sk-b")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_is_ended(stream: bool) -> None:
    async def main() -> None:
        slow = Slow()
        async with app(slow, None, max_seconds=0.1) as client:
            response = await client.post("/v1/chat/completions", json=ASKED | {"stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "time_limit"
        assert slow.ended == 1

    asyncio.run(main())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    """Part by part, each in time, it may take as long as it takes."""

    async def main() -> None:
        whole = create_app({"slow": Served(Slow())}, Policy(None, max_body_bytes=1000, max_pictures=1))
        guards = Guards(whole, model="slow", hashes=None, max_body_bytes=1000, body_seconds=0.3)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(guards), base_url="http://test")

        async def parts(seconds: float) -> AsyncGenerator[bytes]:
            for part in (b'{"model": "slow", ', b'"prompt": ', b'"hi"}'):
                await asyncio.sleep(seconds)
                yield part

        headers = {"Content-Type": "application/json"}
        assert (await client.post("/tokenize", content=parts(0.15), headers=headers)).status_code == 200
        late = await client.post("/tokenize", content=parts(0.6), headers=headers)
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "body_timeout"

    asyncio.run(main())
