"""The prefix cache: what it saves, and what its keys tell apart."""

import asyncio
import statistics
import time
from pathlib import Path

import pytest
import torch

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.paged import PagedCache
from mqwen.engine.request import Request
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from tests.engine.asking import collect, prompt, tokens, with_engine
from tests.engine.tiny import generate_alone, picture


def test_a_hit_skips_what_was_computed_and_says_so(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "Which digit is in the picture?", 3)
    pictures = [picture(1), picture(2), picture(3)]
    length = len(ids) + 3 * 35
    fed = []
    handle = model.transformer.h[0].register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))

    async def use(engine: Engine) -> None:
        first = tokens(await collect(engine, Request("a", ids, pictures, 3)))
        assert fed[0] == length
        fed.clear()
        assert tokens(await collect(engine, Request("b", ids, pictures, 3))) == first
        kept = (length - 1) // 16 * 16
        assert fed[0] == length - kept
        assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (2 * length, kept)
        assert engine.stats().pictures_encoded == 3
        fed.clear()
        await collect(engine, Request("c", ids, [*pictures[:2], picture(4)], 3))  # another last picture
        shared = ids.index(processor.tokenizer.image_token_id) + 2 * 36
        assert fed[0] >= length - shared
        assert fed[0] < length - shared + 32

    try:
        with_engine(model, processor, use)
    finally:
        handle.remove()


def test_found_prefixes_are_read_by_a_few_prompts_at_once(
    model: MQWenLMHeadModel, processor: MQWenProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or many requests with a long prefix in common would gather it for all of them in one step."""
    gathered = []
    gather = PagedCache.gather

    def counted(cache: PagedCache, layer: int, pages: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = gather(cache, layer, pages, rows)
        gathered.append(rows * keys.shape[2])
        return keys, values

    monkeypatch.setattr(PagedCache, "gather", counted)
    prefix = prompt(processor, "Which digit is in the picture? " * 12, 0)
    settings = EngineSettings(max_length=len(prefix) + 4, max_step_positions=len(prefix))

    async def use(engine: Engine) -> None:
        await collect(engine, Request("first", prefix, [], 2))
        gathered.clear()
        await asyncio.gather(*(collect(engine, Request(str(n), [*prefix, n], [], 2)) for n in range(12)))
        assert engine.stats().prefix_hits >= 12 * (len(prefix) // 16 * 16)

    with_engine(model, processor, use, settings)
    assert len(prefix) + 1 <= max(gathered) <= 4 * (len(prefix) + 4 + 15)


def test_changed_weights_change_the_keys(artifact: Path, processor: MQWenProcessor) -> None:
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    ids = prompt(processor, "Which digit is in the picture?", 1)
    request = Request("a", ids, [picture(1)], 12)
    engine = Engine(model, processor)
    engine.generate_all([request])
    with torch.no_grad():
        model.transformer.h[1].mlp.w1.weight.mul_(-1)
        model.feature_proj[0].weight.mul_(0.5)
    [answer] = engine.generate_all([request])
    asyncio.run(engine.drain())
    expected, tie = generate_alone(model, processor, ids, [picture(1)], 12)
    assert hasattr(answer, "token_ids")
    assert list(answer.token_ids)[: len(expected) if tie else None] == expected


def test_prompts_with_other_rotary_factors_share_nothing(artifact: Path, processor: MQWenProcessor) -> None:
    """The same beginning, but one prompt is longer than what the model was trained on."""
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    model.config.seq_length = 64
    short = prompt(processor, "Which digit?")
    engine = Engine(model, processor, EngineSettings(max_length=256))
    long = short[:-5] * 6
    engine.generate_all([Request("a", short[:60], max_tokens=2), Request("b", long[:200], max_tokens=2)])
    [answer] = engine.generate_all([Request("c", long[:100], max_tokens=10)])
    asyncio.run(engine.drain())
    expected, tie = generate_alone(model, processor, long[:100], [], 10)
    assert hasattr(answer, "token_ids")
    assert list(answer.token_ids)[: len(expected) if tie else None] == expected


def test_a_hit_comes_sooner(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    """Time to first token of a long prompt with pictures: all new; pictures known; prefix known."""
    ids = prompt(processor, "How many digits are there in the picture?" * 3, 8)

    async def first_token(engine: Engine, name: str, pictures: list[bytes]) -> float:
        started = time.perf_counter()
        events = engine.generate(Request(name, ids, pictures, 2))
        await anext(events)
        taken = time.perf_counter() - started
        await events.aclose()
        return taken

    async def use(engine: Engine) -> None:
        await first_token(engine, "warm", [picture(900 + n) for n in range(8)])
        new, known, prefix = [], [], []
        for round_ in range(5):
            pictures = [picture(100 * round_ + n) for n in range(8)]
            new.append(await first_token(engine, "a", pictures))
            known.append(await first_token(engine, "b", pictures[::-1]))
            prefix.append(await first_token(engine, "c", pictures))
        times = [1000 * statistics.median(one) for one in (new, known, prefix)]
        print("time to first token, ms: new {:.1f}, pictures known {:.1f}, prefix known {:.1f}".format(*times))
        assert times[1] < times[0]
        assert times[2] < 0.7 * times[1]

    with_engine(model, processor, use)
