"""Random traffic for a long time: whatever comes and goes, every block comes back and memory does not grow.

MQWEN_TRAFFIC_SECONDS is its length, 1800 if unset.
"""

import asyncio
import gc
import os
import time
from random import Random

import pytest

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request, RequestError
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from tests.engine.asking import prompt
from tests.engine.tiny import picture
from tests.memory import anonymous_bytes

SECONDS = float(os.environ.get("MQWEN_TRAFFIC_SECONDS", "1800"))
POSITION = 2 * 4 * 128 * 4  # bytes
SETTINGS = EngineSettings(
    kv_cache_bytes=1500 * POSITION, max_batch_size=16, max_step_positions=200, picture_cache_bytes=1 << 20
)


def draw_request(random: Random, processor: MQWenProcessor, name: str) -> Request:
    pictures = [
        picture(random.choice([random.randrange(9), random.getrandbits(40)])) for _ in range(random.randrange(4))
    ]
    ids = prompt(
        processor, "Which digit? 图片里是哪个数字？"[: random.randrange(25)] * random.randrange(1, 6), len(pictures)
    )
    options = random.choice(
        [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}]
    )
    if random.random() < 0.1:
        options = {**options, "regex": "[0-9]{1,12}"}
    if random.random() < 0.1:
        pictures = pictures[1:] or [b"no picture"]  # refused
    return Request(name, ids, pictures, random.randrange(1, 90), key=random.choice("abc"), **options)


async def one(engine: Engine, random: Random, request: Request) -> None:
    """Read to the end, or given up, or aborted, at any point."""
    leaves = random.randrange(60) if random.random() < 0.4 else 10**6
    events = engine.generate(request)
    try:
        async for event in events:
            leaves -= 1
            if leaves == 0:
                engine.abort(request.request_id)
            if leaves < 0 and random.random() < 0.5:
                break
            assert event.finish_reason != "abort" or leaves <= 0
    except RequestError:
        pass
    finally:
        await events.aclose()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 300)
def test_random_traffic(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    random = Random(0)
    memory: list[tuple[float, int]] = []

    async def client(engine: Engine, name: int, ends: float) -> int:
        done = 0
        while time.monotonic() < ends:
            await one(engine, random, draw_request(random, processor, f"{name} {done}"))
            done += 1
        return done

    async def watch(started: float, ends: float) -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(SECONDS / 180)
            gc.collect()
            memory.append((time.monotonic() - started, anonymous_bytes()))

    async def main() -> None:
        engine = Engine(model, processor, SETTINGS)
        started = time.monotonic()
        ends = started + SECONDS
        *counts, _ = await asyncio.gather(*(client(engine, name, ends) for name in range(32)), watch(started, ends))
        await engine.drain()
        stats = engine.stats()
        late = [size for at, size in memory if at >= SECONDS / 6]
        middle = (max(late) + min(late)) / 2
        curve = ", ".join(str(size >> 20) for _, size in memory[::18])
        print(
            f"{sum(counts)} requests in {SECONDS:.0f} s; memory over time {curve} MiB, {min(late) >> 20} to "
            f"{max(late) >> 20} from minute {SECONDS / 360:.0f} on; {stats}"
        )
        assert stats.kv_blocks_used == stats.running == stats.waiting == stats.failed == 0
        assert min(stats.finished, stats.aborted, stats.preemptions, stats.prefix_hits) > 0
        assert max(late) <= 1.05 * middle

    asyncio.run(main())
