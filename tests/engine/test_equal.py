"""Whatever runs beside a request, and however the engine is set: its greedy tokens are those of transformers' generate.

Requests, settings and the neighbours that leave are drawn at random. A tie, that is a step whose two largest logits are
closer than 1e-4, ends the comparison of its request: there company may change the choice.
"""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from mqwen.engine.engine import Engine, EngineSettings, EngineStats
from mqwen.engine.request import Request
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.chat import encode_chat
from tests.engine.tiny import build_artifact, generate_alone, picture

TEXTS = ("Which digit is in the picture?", "图片里是哪个数字？", "How many?", "总和", "最左边的数字是三，总和是十一。")
PREFIXES = ("", "How many digits are there? The sum of the digits is eleven.", "一共有几个数字？最左边的数字是三。")
PICTURES = [picture(seed) for seed in range(6)]
BLOCK = 2 * 4 * 128 * 4 * 16  # bytes of 16 positions of the tiny model


@dataclass
class Asked:
    """A request, generate's tokens up to the first tie, and whether there is one."""

    request: Request
    expected: list[int]
    tie: bool


def load(artifact: Path) -> tuple[MQWenLMHeadModel, MQWenProcessor]:
    return MQWenLMHeadModel.from_pretrained(artifact).eval(), MQWenProcessor.from_pretrained(artifact)


def draw_request(random: Random, processor: MQWenProcessor, name: str, grows: bool) -> Request:
    """grows: out of a small cache, by a short prompt and a long answer."""
    pictures = [random.choice(PICTURES) for _ in range(0 if grows else random.choice([0, 0, 1, 1, 2, 3, 4]))]
    parts: list[dict[str, str]] = [{"type": "text", "text": random.choice(PREFIXES)}]
    for _ in pictures:
        parts += [{"type": "text", "text": random.choice(TEXTS)[: random.randrange(6)]}, {"type": "image"}]
    parts.append({"type": "text", "text": random.choice(TEXTS)})
    ids = encode_chat(processor.tokenizer, [{"role": "user", "content": parts}], add_generation_prompt=True).input_ids
    return Request(name, ids, pictures, random.randrange(1, 80 if grows else 25), key=random.choice("abc"))


def draw_settings(random: Random) -> EngineSettings:
    return EngineSettings(
        max_length=320,
        max_batch_size=random.choice([3, 8, 64]),
        max_step_positions=random.choice([16, 23, 64, 300, 2048]),
        block_size=random.choice([1, 5, 16, 64]),
        kv_cache_bytes=random.choice([20, 22, 30, 400]) * BLOCK,
        picture_batch=random.choice([1, 32]),
        picture_cache_bytes=random.choice([0, 3 * 36 * 128 * 4, 1 << 20]),
        overlap=random.choice([False, True]),
    )


def ask_alone(model: MQWenLMHeadModel, processor: MQWenProcessor, request: Request) -> Asked:
    tokens, tie = generate_alone(model, processor, request.input_ids, request.pictures, request.max_tokens or 0)
    return Asked(request, tokens, tie)


def compare(
    model: MQWenLMHeadModel, processor: MQWenProcessor, settings: EngineSettings, asked: list[Asked], random: Random
) -> EngineStats:
    """Asks all at once, beside as many others that are given up after some tokens or before any."""

    async def one(engine: Engine, request: Request) -> list[int]:
        for _ in range(random.randrange(20)):
            await asyncio.sleep(0)
        return [token async for event in engine.generate(request) for token in event.token_ids]

    async def gives_up(engine: Engine, request: Request) -> None:
        task = asyncio.create_task(one(engine, request))
        await asyncio.sleep(random.random() / 20)
        task.cancel()

    async def main() -> EngineStats:
        engine = Engine(model, processor, settings)
        names = iter(range(10**6))
        others = [replace(item.request, request_id=f"other {next(names)}", max_tokens=60) for item in asked]
        leaving = [asyncio.create_task(gives_up(engine, other)) for other in others]
        async with asyncio.timeout(300):
            found = await asyncio.gather(*(one(engine, item.request) for item in asked))
            await asyncio.gather(*leaving)
            await engine.drain()
        for item, tokens in zip(asked, found, strict=True):
            compared = tokens[: len(item.expected)] if item.tie else tokens
            assert compared == item.expected, (settings, item.request.request_id)
        stats = engine.stats()
        assert stats.kv_blocks_used == stats.running == stats.waiting == stats.failed == 0
        return stats

    return asyncio.run(main())


def compare_many(model: MQWenLMHeadModel, processor: MQWenProcessor, count: int, settings: int, seed: int) -> None:
    random = Random(seed)
    share = -(-count // settings)
    requests = [draw_request(random, processor, str(n), grows=n < share) for n in range(count)]
    asked = [ask_alone(model, processor, request) for request in requests]
    drawn = [draw_settings(random) for _ in range(settings)]
    drawn[0] = replace(drawn[0], kv_cache_bytes=10 * BLOCK, max_step_positions=16, block_size=2, max_batch_size=8)
    stats = [compare(model, processor, one, asked[i * share :][:share], random) for i, one in enumerate(drawn)]
    assert sum(one.preemptions for one in stats) > 0
    assert sum(one.prefix_hits for one in stats) > 0
    ties = sum(item.tie for item in asked)
    print(
        f"{count} requests equal generate's tokens, {ties} of them up to a tie; "
        f"{sum(one.preemptions for one in stats)} preemptions, {sum(one.aborted for one in stats)} neighbours left"
    )
    assert ties <= count // 10
    assert len({tuple(item.expected) for item in asked}) > count // 3, "the tiny model says the same to everybody"


def test_random_requests_equal_generate(artifact: Path) -> None:
    compare_many(*load(artifact), count=48, settings=6, seed=0)


def test_random_requests_beyond_the_trained_length_equal_generate(tmp_path: Path) -> None:
    """Each with the rotary factor of its own prompt, and logn: prompts from half to five times seq_length."""
    compare_many(*load(build_artifact(tmp_path / "short", seq_length=48)), count=24, settings=3, seed=1)


@pytest.mark.soak
def test_500_random_requests_equal_generate(artifact: Path, tmp_path: Path) -> None:
    compare_many(*load(artifact), count=350, settings=25, seed=2)
    compare_many(*load(build_artifact(tmp_path / "short", seq_length=48)), count=150, settings=15, seed=3)
