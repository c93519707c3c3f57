"""Prompts, and an engine in an event loop, for the tests that ask one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request, TokenEvent
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.chat import encode_chat


def prompt(processor: MQWenProcessor, text: str, pictures: int = 0) -> list[int]:
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    return encode_chat(processor.tokenizer, messages, add_generation_prompt=True).input_ids


async def collect(engine: Engine, request: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def with_engine(
    model: MQWenLMHeadModel,
    processor: MQWenProcessor,
    use: Callable[[Engine], Awaitable[None]],
    settings: EngineSettings | None = None,
) -> None:
    async def main() -> None:
        engine = Engine(model, processor, settings)
        try:
            await asyncio.wait_for(use(engine), timeout=60)
        finally:
            await engine.drain()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
