"""The engine against `model.generate` one by one, and its manners: aborts, refusals, draining."""

import asyncio
import gc
import weakref
from pathlib import Path
from random import Random
from typing import NoReturn

import numpy as np
import pytest

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.outbox import Outbox
from mqwen.engine.request import (
    ContextLengthError,
    EngineClosedError,
    EngineFailedError,
    InvalidPictureError,
    Request,
    RequestError,
    TokenEvent,
)
from mqwen.engine.sequence import Sequence
from mqwen.engine.text import TextStream
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.telemetry import metric, serving
from tests.engine.asking import collect, prompt, tokens, until, with_engine
from tests.engine.tiny import generate_alone, picture

FOLLOWED = (serving.NUM_REQUESTS_WAITING, serving.NUM_REQUESTS_RUNNING, serving.KV_CACHE_USAGE_PERC)
QUESTIONS = ["Which digit?", "图片里是哪个数字？", "How many digits are there in the picture?", "总和"]


def requests(processor: MQWenProcessor, count: int, **options: object) -> list[Request]:
    random = Random(0)
    made = []
    for number in range(count):
        pictures = [picture(random.randrange(6)) for _ in range(random.choice([0, 1, 1, 2, 3]))]
        text = random.choice(QUESTIONS) * random.randrange(1, 5)
        ids = prompt(processor, text, len(pictures))
        made.append(Request(str(number), ids, pictures, max_tokens=random.randrange(1, 20), **options))  # type: ignore[arg-type]
    return made


def one_by_one(model: MQWenLMHeadModel, processor: MQWenProcessor, request: Request) -> list[int]:
    found, tie = generate_alone(model, processor, request.input_ids, request.pictures, request.max_tokens or 0)
    assert not tie, "take another prompt: the likeliest token of this one is not clear"
    return found


@pytest.fixture(scope="module")
def answered(model: MQWenLMHeadModel, processor: MQWenProcessor) -> list[tuple[Request, list[int]]]:
    """Requests with generate's greedy tokens, but those that a tie leaves open."""
    asked = requests(processor, 24)
    alone = [generate_alone(model, processor, one.input_ids, one.pictures, one.max_tokens or 0) for one in asked]
    clear = [(request, tokens) for request, (tokens, tie) in zip(asked, alone, strict=True) if not tie]
    assert len(clear) >= 22
    assert len({tuple(tokens) for _, tokens in clear}) > 12, "the tiny model says the same to everybody"
    return clear


def test_a_job_gets_whole_answers_and_refusals_in_order(
    model: MQWenLMHeadModel, processor: MQWenProcessor, answered: list[tuple[Request, list[int]]]
) -> None:
    asked, expected = zip(*answered[:6], strict=True)
    bad_picture = Request("bad", prompt(processor, "Which?", 1), [b"no picture"])
    too_long = Request("long", prompt(processor, "Which?", 0), max_tokens=10_000)
    engine = Engine(model, processor)
    found = engine.generate_all([bad_picture, *asked, too_long])
    assert isinstance(found[0], InvalidPictureError)
    assert isinstance(found[-1], ContextLengthError)
    for event, answer in zip(found[1:-1], expected, strict=True):
        assert isinstance(event, TokenEvent)
        assert list(event.token_ids) == answer
        assert event.text == processor.tokenizer.decode(answer, skip_special_tokens=True)
    again = engine.generate_all(asked)  # the same ids: none is left behind
    assert again == found[1:-1]
    asyncio.run(engine.drain())
    with pytest.raises(EngineClosedError):
        engine.generate_all(asked)


@pytest.mark.parametrize("settings", [EngineSettings(), EngineSettings(max_batch_size=3, picture_cache_bytes=0)])
def test_greedy_tokens_are_those_of_generate_alone_and_in_company(
    model: MQWenLMHeadModel,
    processor: MQWenProcessor,
    answered: list[tuple[Request, list[int]]],
    settings: EngineSettings,
) -> None:
    asked, expected = zip(*answered, strict=True)

    async def use(engine: Engine) -> None:
        assert [tokens(await collect(engine, request)) for request in asked[:4]] == list(expected[:4])
        in_company = await asyncio.gather(*(collect(engine, request) for request in asked))
        assert [tokens(events) for events in in_company] == list(expected)
        for request, events in zip(asked, in_company, strict=True):
            text = processor.tokenizer.decode(tokens(events), skip_special_tokens=True)
            assert "".join(event.text for event in events) == text
            last = events[-1]
            stopped = last.token_ids[-1] in processor.tokenizer.stop_ids
            assert last.finish_reason == ("stop" if stopped else "length")
            assert last.completion_tokens == len(tokens(events))
            assert last.prompt_tokens == len(request.input_ids) + 35 * len(request.pictures)
            assert all(event.finish_reason is None for event in events[:-1])

    with_engine(model, processor, use, settings)


def test_seeded_samples_are_the_same_alone_and_in_company(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    asked = requests(processor, 8, temperature=1.0, top_p=0.9, seed=5)

    async def use(engine: Engine) -> None:
        alone = [tokens(await collect(engine, request)) for request in asked]
        in_company = await asyncio.gather(*(collect(engine, request) for request in asked))
        assert [tokens(events) for events in in_company] == alone
        other = [Request(**{**vars(request), "seed": 6}) for request in asked]
        assert [tokens(await collect(engine, request)) for request in other] != alone

    with_engine(model, processor, use)


def test_a_stop_text_ends_the_answer_before_it(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    request = Request("a", prompt(processor, "Which digit?", 0), max_tokens=30)

    async def use(engine: Engine) -> None:
        text = "".join(event.text for event in await collect(engine, request))
        stop = text[len(text) // 2 :][:3]
        events = await collect(engine, Request("b", request.input_ids, max_tokens=30, stop=[stop]))
        assert "".join(event.text for event in events) == text[: text.index(stop)]
        assert events[-1].finish_reason == "stop"

    with_engine(model, processor, use)


def test_pictures_are_encoded_once(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    encoded = []
    handle = model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    ids = prompt(processor, "Which digit?", 2)

    async def use(engine: Engine) -> None:
        await collect(engine, Request("a", ids, [picture(1), picture(2)], max_tokens=2))
        same = [Request(str(i), ids, [picture(1), picture(3)], max_tokens=2) for i in range(4)]
        await asyncio.gather(*(collect(engine, request) for request in same))
        pixels = processor.pixels(picture(4))
        await collect(engine, Request("b", ids, [pixels, pixels], max_tokens=2))
        assert engine.stats().pictures_encoded == 4
        assert engine.stats().pictures_reused >= 1
        assert engine.stats().picture_cache_bytes == 4 * 36 * 128 * 4

    try:
        with_engine(model, processor, use)
    finally:
        handle.remove()
    assert sum(encoded) == 4


def test_refused_requests_leave_their_neighbours_alone(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "Which digit?", 1)
    good = Request("good", ids, [picture(1)], max_tokens=5)
    expected = one_by_one(model, processor, good)
    refused: list[tuple[Request, type[RequestError], str]] = [
        (Request("1", ids, [b"no picture"], max_tokens=5), InvalidPictureError, "Picture 1: 10 bytes are no picture"),
        (Request("2", ids, [picture(1)[:200]], max_tokens=5), InvalidPictureError, "Picture 1"),
        (Request("3", ids, [picture(1), picture(2)], max_tokens=5), InvalidPictureError, "2 pictures .* 1 placeholder"),
        (Request("4", ids, [], max_tokens=5), InvalidPictureError, "0 pictures .* 1 placeholder"),
        (Request("5", ids, [picture(1)], max_tokens=513), ContextLengthError, "513 tokens to generate.* 512"),
        (Request("6", ids * 20, [picture(1)] * 20), ContextLengthError, "the context has 512"),
        (Request("7", [], max_tokens=5), RequestError, "empty"),
        (Request("8", [10**6], max_tokens=5), RequestError, "1000000"),
        (Request("9", ids, [processor.pixels(picture(1))[:, :8]], max_tokens=5), InvalidPictureError, "48"),
        (Request("10", ids, [picture(1)], max_tokens=5, temperature=-1), RequestError, "temperature"),
        (Request("11", ids, [picture(1)], max_tokens=0), RequestError, "max_tokens"),
    ]

    async def use(engine: Engine) -> None:
        tries = [collect(engine, request) for request, _, _ in refused]
        events, *errors = await asyncio.gather(collect(engine, good), *tries, return_exceptions=True)
        assert not isinstance(events, BaseException)
        assert tokens(events) == expected
        for (_, kind, message), error in zip(refused, errors, strict=True):
            with pytest.raises(kind, match=message):
                raise error  # type: ignore[misc]
        assert engine.stats().failed == 0

    with_engine(model, processor, use)


def test_a_closed_iterator_aborts_and_others_go_on(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "总和", 0)
    good = Request("good", ids, max_tokens=40)
    expected = one_by_one(model, processor, good)

    async def use(engine: Engine) -> None:
        left = engine.generate(Request("left", ids, max_tokens=400, temperature=1.0, seed=1))
        cancelled = asyncio.create_task(collect(engine, Request("cancelled", ids, max_tokens=400, temperature=1.0)))
        staying = asyncio.create_task(collect(engine, good))
        await anext(left)
        await left.aclose()
        cancelled.cancel()
        assert tokens(await staying) == expected
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().aborted >= 1
        assert engine.stats().generated_tokens < 400

    with_engine(model, processor, use)


def test_abort_by_id_ends_the_iterator(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    request = Request("a", prompt(processor, "总和", 0), max_tokens=400, temperature=2.0, seed=3)

    async def use(engine: Engine) -> None:
        events = []
        async for event in engine.generate(request):
            events.append(event)
            engine.abort("a")
        assert events[-1].finish_reason == "abort"
        assert len(events) < 400
        engine.abort("unknown")

    with_engine(model, processor, use)


def test_a_reader_whose_loop_ended_does_no_harm(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "总和", 0)
    engine = Engine(model, processor)

    async def leave() -> None:
        await anext(engine.generate(Request("left", ids, max_tokens=400, temperature=2.0, seed=3)))

    async def stay() -> list[TokenEvent]:
        return await collect(engine, Request("stays", ids, max_tokens=4))

    asyncio.run(leave())
    assert asyncio.run(stay())[-1].completion_tokens == 4
    assert engine.stats().failed == 0
    asyncio.run(engine.drain())


def test_drain_finishes_what_runs_and_refuses_what_comes(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    asked = requests(processor, 6)

    async def main() -> None:
        engine = Engine(model, processor)
        started = [asyncio.create_task(collect(engine, request)) for request in asked]
        await asyncio.sleep(0)  # lets them begin
        await asyncio.wait_for(engine.drain(), timeout=60)
        assert {events[-1].finish_reason for events in await asyncio.gather(*started)} <= {"stop", "length"}
        assert not engine.health()
        with pytest.raises(EngineClosedError):
            await collect(engine, asked[0])

    asyncio.run(main())


def test_failing_steps_fail_their_requests_and_then_the_engines_health(
    artifact: Path, processor: MQWenProcessor
) -> None:
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    del model.transformer.ln_f.weight
    request = Request("a", prompt(processor, "总和", 0), max_tokens=4)

    async def use(engine: Engine) -> None:
        for _ in range(3):
            assert engine.health()
            with pytest.raises(EngineFailedError):
                await collect(engine, request)
        assert not engine.health()
        assert engine.stats().failed == 3

    with_engine(model, processor, use)


def test_a_thread_that_ends_fails_its_readers_and_refuses_others(
    model: MQWenLMHeadModel, processor: MQWenProcessor
) -> None:
    request = Request("a", prompt(processor, "总和", 0), max_tokens=4)

    async def use(engine: Engine) -> None:
        def schedule() -> NoReturn:
            raise MemoryError

        engine._scheduler.schedule = schedule  # type: ignore[method-assign]
        with pytest.raises(EngineFailedError, match="has ended"):
            await collect(engine, request)
        with pytest.raises(EngineClosedError):
            await collect(engine, request)
        await until(lambda: not engine.health())

    with_engine(model, processor, use)


def test_a_drained_engine_is_freed(artifact: Path, processor: MQWenProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet:
        def set(self, value: float, labels: dict[str, str]) -> None: ...

    gauge = Quiet()
    monkeypatch.setattr(metric, "_made", {one.name: gauge for one in FOLLOWED})
    monkeypatch.setattr(metric.Gauge, "_ray", lambda self: metric._made[self.name])
    engine = Engine(MQWenLMHeadModel.from_pretrained(artifact).eval(), processor)
    asyncio.run(engine.drain())
    left = weakref.ref(engine)
    del engine
    gc.collect()
    assert left() is None


def test_events_come_no_oftener_than_their_pause_allows() -> None:
    async def main() -> None:
        stream = TextStream(lambda token: b"a", ())
        sequence = Sequence(Request("one", [1, 2]), np.array([1, 2]), [], 4, stream, Outbox(streams=True))
        told = [sequence.add(5 + n, frozenset(), None, pause) for n, pause in enumerate((60.0, 60.0, 0.0, 60.0))]
        assert told == [True, False, True, True]  # the first; none; the two since; the last, come what may
        assert (await sequence.outbox.take()).token_ids == (5, 6, 7, 8)

    asyncio.run(main())
