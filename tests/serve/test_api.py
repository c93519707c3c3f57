"""What the API gives, in this process: log probabilities, answers by a schema, tokens, several models, any input."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.adapters import attach_adapter
from mqwen.model.chat import encode_chat
from serve.backend import Served
from serve.ingress import Policy, create_app
from serve.replica import ModelReplica
from serve.settings import ModelSettings
from tests.engine.test_requests import save_adapter
from tests.engine.tiny import generate_alone, picture
from tests.serve.conftest import LocalBackend
from tests.serve.pictures import data_url

POLICY = Policy(key_hashes=None, max_body_bytes=1 << 20, max_pictures=4)
PARTS = [
    {"type": "image_url", "image_url": {"url": data_url(picture(1))}},
    {"type": "text", "text": "Which digit?"},
    {"type": "image_url", "image_url": {"url": data_url(picture(2))}},
]
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": PARTS}], "temperature": 0}
PLAIN: list[Any] = [{"role": "user", "content": [{"type": "image"}, PARTS[1], {"type": "image"}]}]


class Client:
    def __init__(self, replica: ModelReplica, runner: asyncio.Runner) -> None:
        backend = LocalBackend(replica)
        self.app = create_app({"tiny": Served(backend), "poems": Served(backend, "poems")}, POLICY)
        self._runner = runner

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await client.post(path, json=body)

        return self._runner.run(send())

    def chat(self, **options: Any) -> dict[str, Any]:
        response = self.post("/v1/chat/completions", ASKED | options)
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self, **options: Any) -> list[dict[str, Any]]:
        response = self.post("/v1/chat/completions", ASKED | options | {"stream": True})
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.fixture(scope="module")
def client(replica: ModelReplica) -> Iterator[Client]:
    with asyncio.Runner() as runner:
        yield Client(replica, runner)


def test_logprobs_are_the_models(client: Client, artifact: Path) -> None:
    (choice,) = client.chat(logprobs=True, top_logprobs=3, max_tokens=6)["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in entries).decode("utf-8", "replace") == choice["message"]["content"]

    model, processor = MQWenLMHeadModel.from_pretrained(artifact).eval(), MQWenProcessor.from_pretrained(artifact)
    inputs = processor(messages=PLAIN, images=[picture(1), picture(2)], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs, logits_to_keep=1).logits[0, -1].log_softmax(-1)
    first = entries[0]
    top = expected.topk(3)
    assert [one["logprob"] for one in first["top_logprobs"]] == pytest.approx(top.values.tolist(), abs=2e-3)
    assert first["logprob"] == first["top_logprobs"][0]["logprob"]
    words = processor.tokenizer.convert_ids_to_tokens(top.indices.tolist())
    assert [one["token"] for one in first["top_logprobs"]] == words  # of random weights, control tokens among them
    assert all(one["logprob"] <= 0 and math.isfinite(one["logprob"]) for one in entries)

    streamed = client.chunks(logprobs=True, top_logprobs=3, max_tokens=6)
    found = [one for chunk in streamed for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert found == entries
    assert client.chat(max_tokens=2)["choices"][0]["logprobs"] is None


SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema(client: Client, temperature: float) -> None:
    like = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    (choice,) = client.chat(response_format=like, temperature=temperature, seed=3)["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    text = "".join(
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in client.chunks(response_format=like, temperature=temperature, seed=3)
    )
    assert text == choice["message"]["content"]


def test_tokens_are_those_of_the_prompt(client: Client, artifact: Path) -> None:
    tokenizer = MQWenProcessor.from_pretrained(artifact).tokenizer
    found = client.post("/tokenize", {"model": "tiny", "messages": ASKED["messages"]}).json()
    assert found["tokens"] == encode_chat(tokenizer, PLAIN, add_generation_prompt=True).input_ids
    assert found["count"] == len(found["tokens"]) + 2 * 35 == client.chat(max_tokens=1)["usage"]["prompt_tokens"]
    assert found["max_model_len"] == 512
    text = "图片里有 <|im_end|> digits"
    plain = client.post("/tokenize", {"model": "tiny", "prompt": text}).json()
    assert tokenizer.decode(plain["tokens"]) == text
    assert plain["count"] == len(plain["tokens"])
    assert client.post("/tokenize", {"model": "tiny"}).status_code == 400
    assert client.post("/tokenize", {"model": "tiny", "prompt": "word " * 9000}).json()["error"]["param"] == "prompt"


def test_an_answer_is_as_long_as_the_operator_allows(artifact: Path) -> None:
    replica = ModelReplica(ModelSettings(checkpoint=artifact, max_answer=3))
    with asyncio.Runner() as runner:
        client = Client(replica, runner)
        assert client.chat()["usage"]["completion_tokens"] <= 3
        assert client.chat(max_tokens=2)["usage"]["completion_tokens"] <= 2
        refused = client.post("/v1/chat/completions", ASKED | {"max_completion_tokens": 4})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_completion_tokens"
        runner.run(replica.engine.drain())


def test_an_adapter_is_a_model_of_its_own(artifact: Path, tmp_path: Path) -> None:
    folder, processor = save_adapter(artifact, tmp_path, 1, projector=True), MQWenProcessor.from_pretrained(artifact)
    ids = encode_chat(processor.tokenizer, PLAIN, add_generation_prompt=True).input_ids
    answers = []
    for adapter in (None, folder):
        model = MQWenLMHeadModel.from_pretrained(artifact).eval()
        if adapter:
            attach_adapter(model, adapter).merge_and_unload()
        tokens, _ = generate_alone(model, processor, ids, [picture(1), picture(2)], 8)
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    replica = ModelReplica(ModelSettings(checkpoint=artifact, adapters={"poems": str(folder)}))
    with asyncio.Runner() as runner:
        client = Client(replica, runner)
        for name, answer in zip(("tiny", "poems"), answers, strict=True):
            reply = client.chat(model=name, max_tokens=8)
            assert reply["model"] == name
            assert reply["choices"][0]["message"]["content"].startswith(answer)  # which ends before a tie
        runner.run(replica.engine.drain())
    assert answers[0] != answers[1]


def test_each_name_is_a_model(client: Client) -> None:
    async def names() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as http:
            return [one["id"] for one in (await http.get("/v1/models")).json()["data"]]

    assert asyncio.run(names()) == ["tiny", "poems"]
    refused = client.post("/v1/chat/completions", ASKED | {"model": "poems"})  # the engine here has loaded no adapter
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_adapter")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_the_document_says_is_no_error_of_ours(client: Client, mode: GenerationMode) -> None:
    """schemathesis makes requests from the OpenAPI document: what it allows, and what it forbids."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    statuses: set[int] = set()

    def check(case: Any) -> None:
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    for one in schema.get_all_operations():
        operation = one.ok()
        if mode is GenerationMode.POSITIVE or operation.body:  # of what has no body nothing can be forbidden
            quiet = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            quiet(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert statuses >= ({200, 400, 404} if mode is GenerationMode.POSITIVE else {400})
