"""What a request may ask for: seeds, stop tokens, log probabilities, schemas, adapters; and what is refused, alone."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import (
    ContextLengthError,
    EngineFailedError,
    InvalidGrammarError,
    InvalidPictureError,
    Request,
    RequestError,
    UnknownAdapterError,
)
from mqwen.engine.scheduler import Work
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.adapters import AdapterError, attach_adapter
from tests.engine.asking import collect, prompt, tokens, with_engine
from tests.engine.tiny import generate_alone, picture

SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "clear": {"type": "boolean"}},
    "required": ["digit", "clear"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("settings", [EngineSettings(), EngineSettings(max_step_positions=16, overlap=True)])
def test_seeded_samples_are_the_same_alone_and_in_company(
    model: MQWenLMHeadModel, processor: MQWenProcessor, settings: EngineSettings
) -> None:
    options: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 30, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    ]
    ids = prompt(processor, "Which digit?", 1)
    asked = [
        Request(str(n), ids, [picture(n % 3)], 20, temperature=1.2, seed=5 + n, **options[n % 4]) for n in range(12)
    ]

    async def use(engine: Engine) -> None:
        alone = [tokens(await collect(engine, request)) for request in asked]
        in_company = await asyncio.gather(*(collect(engine, request) for request in asked))
        assert [tokens(events) for events in in_company] == alone
        other = [Request(**{**vars(request), "seed": 99}) for request in asked]
        assert [tokens(await collect(engine, request)) for request in other] != alone

    with_engine(model, processor, use, settings)


def test_seeded_samples_are_the_same_after_preemption(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    position = 2 * 4 * 128 * 4
    asked = [
        Request(str(n), prompt(processor, "总和" * n, 0), (), 60, temperature=1.0, seed=50 + n, repetition_penalty=1.2)
        for n in range(8)
    ]
    roomy, tiny = (
        Engine(model, processor),
        Engine(model, processor, EngineSettings(kv_cache_bytes=160 * position, max_length=150)),
    )
    assert roomy.generate_all(asked) == tiny.generate_all(asked)
    assert roomy.stats().preemptions == 0 < tiny.stats().preemptions
    for engine in (roomy, tiny):
        asyncio.run(engine.drain())


def test_a_step_that_fails_beside_a_preemption_changes_no_other_tokens(
    model: MQWenLMHeadModel, processor: MQWenProcessor
) -> None:
    position = 2 * 4 * 128 * 4
    asked = [Request(str(n), prompt(processor, "总和" * n, 0), (), 60, ignore_eos=True) for n in range(8)]
    roomy = Engine(model, processor)
    expected = roomy.generate_all(asked)
    asyncio.run(roomy.drain())
    preempted: list[str] = []

    async def use(engine: Engine) -> None:
        forward = engine._runner.forward

        def fail_once(works: list[Work]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if engine.stats().preemptions and not preempted:
                first = engine._scheduler.waiting.first()
                preempted.append(first.request.request_id)
                raise MemoryError
            return forward(works)

        engine._runner.forward = fail_once  # type: ignore[method-assign, assignment]
        found = await asyncio.gather(*map(engine.complete, asked), return_exceptions=True)
        failed = [isinstance(one, EngineFailedError) for one in found]
        assert preempted and any(failed) and not failed[int(preempted[0])]
        assert [one for one, bad in zip(found, failed, strict=True) if not bad] == [
            one for one, bad in zip(expected, failed, strict=True) if not bad
        ]
        assert await asyncio.gather(*map(engine.complete, asked)) == expected  # from the prefix cache, in part

    with_engine(model, processor, use, EngineSettings(kv_cache_bytes=160 * position, max_length=150, overlap=True))


def test_penalties_are_those_of_generate(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "How many digits are there?")
    settings = GenerationConfig(
        max_new_tokens=30,
        repetition_penalty=1.4,
        suppress_tokens=[processor.tokenizer.image_token_id],
        eos_token_id=processor.tokenizer.stop_ids,
        pad_token_id=processor.tokenizer.eod_id,
    )
    expected = model.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()
    engine = Engine(model, processor)
    [answer] = engine.generate_all([Request("a", ids, max_tokens=30, repetition_penalty=1.4)])
    asyncio.run(engine.drain())
    assert not isinstance(answer, RequestError)
    assert list(answer.token_ids) == expected


def test_stop_ids_and_ignore_eos(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "Which digit?")
    engine = Engine(model, processor)
    [whole] = engine.generate_all([Request("a", ids, max_tokens=30, ignore_eos=True)])
    assert not isinstance(whole, RequestError)
    assert (len(whole.token_ids), whole.finish_reason) == (30, "length")
    stop = whole.token_ids[12]
    first = whole.token_ids.index(stop)
    found = engine.generate_all(
        [
            Request("b", ids, max_tokens=30, stop_ids=[stop]),
            Request("c", ids, max_tokens=30, stop_ids=[stop], ignore_eos=True),
        ]
    )
    asyncio.run(engine.drain())
    assert [(one.token_ids, one.finish_reason) for one in found if not isinstance(one, RequestError)] == [
        (whole.token_ids[: first + 1], "stop"),
        (whole.token_ids, "length"),
    ]


def test_logprobs_are_those_of_the_model(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "Which digit?")
    asked = [
        Request("a", ids, max_tokens=8, logprobs=3),
        Request("b", ids, max_tokens=8, logprobs=0, temperature=1.5, seed=1, repetition_penalty=2.0),
        Request("c", ids, max_tokens=8),
    ]
    engine = Engine(model, processor)
    found = engine.generate_all(asked)
    asyncio.run(engine.drain())
    for request, answer in zip(asked, found, strict=True):
        assert not isinstance(answer, RequestError)
        if request.logprobs is None:
            assert answer.logprobs == ()
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids + list(answer.token_ids)])).logits[0, len(ids) - 1 : -1].clone()
            logits[:, processor.tokenizer.image_token_id] = -torch.inf
        expected = logits.log_softmax(-1)
        for token, one, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
            assert one.token_id == token
            assert one.logprob == pytest.approx(row[token].item(), abs=1e-4)
            values, likeliest = row.topk(request.logprobs)
            assert [token for token, _ in one.top] == likeliest.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_match_their_schema_or_expression(
    model: MQWenLMHeadModel, processor: MQWenProcessor, overlap: bool
) -> None:
    """The model knows nothing of JSON: only the grammar makes it write some."""
    ids = prompt(processor, "Which digit?", 1)
    asked = [Request(str(n), ids, [picture(n)], 100, temperature=1.0, seed=n, json_schema=SCHEMA) for n in range(4)] + [
        Request(f"r{n}", ids, [picture(n)], 40, temperature=1.0, seed=n, regex=r"[1-9][0-9]{2}-(是|否)")
        for n in range(4)
    ]
    free = Request("free", ids, [picture(0)], 30)
    engine = Engine(model, processor, EngineSettings(overlap=overlap))
    [alone] = engine.generate_all([free])
    *found, beside = engine.generate_all([*asked, free])
    asyncio.run(engine.drain())
    assert beside == alone
    for request, answer in zip(asked, found, strict=True):
        assert not isinstance(answer, RequestError)
        assert answer.finish_reason == "stop"
        if request.regex is not None:
            assert re.fullmatch(request.regex, answer.text)
        else:
            said = json.loads(answer.text)
            assert said.keys() == {"digit", "clear"}
            assert said["digit"] in range(10)
            assert isinstance(said["clear"], bool)
    assert len({answer.text for answer in found if not isinstance(answer, RequestError)}) > 4


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(
    model: MQWenLMHeadModel, processor: MQWenProcessor
) -> None:
    """llguidance takes this expression, and gives up when tokens follow."""
    ids = prompt(processor, "Which digit?")
    endless = "((ab){1,4000}|(abab){1,4000}|(ababab){1,4000}){150,200}c"
    engine = Engine(model, processor)
    failed, answer = engine.generate_all(
        [Request("a", ids, max_tokens=300, temperature=1.0, seed=1, regex=endless), Request("b", ids, max_tokens=8)]
    )
    assert isinstance(failed, InvalidGrammarError), failed
    assert failed.param == "regex"
    assert not isinstance(answer, RequestError)
    assert engine.stats().kv_blocks_used == 0
    asyncio.run(engine.drain())


def save_adapter(artifact: Path, folder: Path, seed: int, *, projector: bool) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4 * seed,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "w1"],
        modules_to_save=["feature_proj"] if projector else None,
    )
    wrapped = get_peft_model(MQWenLMHeadModel.from_pretrained(artifact), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(folder)
    return folder


def test_each_request_has_its_own_adapter_or_none(artifact: Path, processor: MQWenProcessor, tmp_path: Path) -> None:
    folders = {
        "one": save_adapter(artifact, tmp_path / "one", 1, projector=True),
        "None": save_adapter(artifact, tmp_path / "two", 2, projector=False),
    }
    ids = prompt(processor, "How many digits are there?", 2)
    pictures = [picture(1), picture(2)]
    expected: dict[str | None, tuple[list[int], bool]] = {}
    for name in (None, *folders):
        merged = MQWenLMHeadModel.from_pretrained(artifact).eval()
        if name is not None:
            attach_adapter(merged, folders[name]).merge_and_unload()
        expected[name] = generate_alone(merged, processor, ids, pictures, 20)
    assert len({tuple(found) for found, _ in expected.values()}) == 3, "the adapters change nothing"
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    async def use(engine: Engine) -> None:
        for again in range(2):  # the second time from the prefix cache
            names = [None, "one", "None", "one", None, "None"]
            asked = [
                Request(f"{again} {n}", ids, pictures, 20, adapter=name, ignore_eos=False)
                for n, name in enumerate(names)
            ]
            for request, events in zip(
                asked, await asyncio.gather(*(collect(engine, request) for request in asked)), strict=True
            ):
                found, tie = expected[request.adapter]
                assert (tokens(events)[: len(found)] if tie else tokens(events)) == found, request.adapter
        with pytest.raises(UnknownAdapterError, match="'three' is not loaded; there are: one, None"):
            await collect(engine, Request("x", ids, pictures, adapter="three"))
        assert engine.stats().prefix_hits > 0

    with pytest.raises(ValueError, match="empty name"):
        Engine(model, processor, EngineSettings(adapters={"": folders["one"]}))
    with_engine(model, processor, use, EngineSettings(adapters=folders, max_step_positions=100))
    assert before.keys() == dict(model.named_parameters()).keys(), "one set of weights, under its own names"
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_adapter_for_another_model_is_refused_at_the_start(
    artifact: Path, processor: MQWenProcessor, tmp_path: Path
) -> None:
    folder = save_adapter(artifact, tmp_path / "other", 1, projector=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    with pytest.raises(AdapterError, match="only LORA"):
        Engine(model, processor, EngineSettings(adapters={"other": folder}))
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_what_cannot_be_served_fails_alone_with_its_kind(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    ids = prompt(processor, "Which digit?")
    pictured = prompt(processor, "Which digit?", 1)
    good = Request("good", ids, max_tokens=12)
    refused: list[tuple[Request, type[RequestError], str]] = [
        (Request("1", ids, max_tokens=200), ContextLengthError, "the context has 128 for both"),  # all of the cache
        (Request("2", ids * 40), ContextLengthError, "the context has 128"),
        (Request("3", ids, json_schema="no schema"), InvalidGrammarError, "json_schema"),
        (Request("4", ids, json_schema={"type": "nonsense"}), InvalidGrammarError, "json_schema"),
        (Request("5", ids, regex="(unclosed"), InvalidGrammarError, "regex"),
        (Request("6", ids, regex="a", json_schema={}), InvalidGrammarError, "both"),
        (Request("7", ids, adapter="french"), UnknownAdapterError, "'french' is not loaded; there are: none"),
        (Request("8", pictured, [b"no picture"]), InvalidPictureError, "Picture 1"),
        (Request("9", ids, temperature=float("nan")), RequestError, "temperature"),
        (Request("10", ids, top_k=-1), RequestError, "top_k"),
        (Request("11", ids, min_p=1.5), RequestError, "min_p"),
        (Request("12", ids, repetition_penalty=0), RequestError, "repetition_penalty"),
        (Request("13", ids, presence_penalty=float("inf")), RequestError, "presence_penalty"),
        (Request("14", ids, frequency_penalty=float("nan")), RequestError, "frequency_penalty"),
        (Request("15", ids, logprobs=21), RequestError, "logprobs"),
        (Request("16", [2**70]), RequestError, "token numbers"),
        (Request("17", [1.5, 2.0]), RequestError, "token numbers"),  # type: ignore[list-item]
        (Request("18", [[1], [2, 3]]), RequestError, "token numbers"),  # type: ignore[list-item]
        (Request("19", ids, stop=("",)), RequestError, "stop"),
    ]

    async def use(engine: Engine) -> None:
        tries = [collect(engine, request) for request, _, _ in refused]
        events, *errors = await asyncio.gather(collect(engine, good), *tries, return_exceptions=True)
        assert not isinstance(events, BaseException)
        assert tokens(events)
        for (request, kind, message), error in zip(refused, errors, strict=True):
            assert type(error) is kind, (request, error)
            assert re.search(message, str(error)), error
            assert "\n" not in str(error)
        assert tokens(await collect(engine, good)) == tokens(events)
        assert engine.stats().failed == 0

        def breaks_off() -> Iterator[Request]:
            yield good
            raise OSError

        with pytest.raises(OSError):
            await asyncio.to_thread(engine.generate_all, breaks_off())
        assert tokens(await collect(engine, good)) == tokens(events)  # its id is free again

    with_engine(model, processor, use, EngineSettings(kv_cache_bytes=128 * 2 * 4 * 128 * 4))
