"""The whole application on Ray Serve, asked by the official client: answers, streams, keys, aborts, back-pressure."""

import asyncio
import json
import math
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray

from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.chat import encode_chat
from mqwen.telemetry import serving
from serve.keys import hash_key
from tests.engine.tiny import build_artifact, generate_alone, picture
from tests.scraping import Scrape, declared, discovered, scrape_until
from tests.serve.collecting import Collector, collecting
from tests.serve.hosting import Host, hosting
from tests.serve.pictures import data_url
from tests.serve.running import KEY, Service, application, driving, running, stats


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Of pictures. The service has its certificate too."""
    with hosting(tmp_path_factory.mktemp("host"), "localhost") as host:
        yield host


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model."""
    return build_artifact(tmp_path_factory.mktemp("other") / "other", layers=2)


@pytest.fixture(scope="module")
def service(
    artifact: Path, other: Path, host: Host, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Two applications on one cluster, over TLS: `/` as users have it, and `/narrow` with little room for requests.

    The first has two models, and two ingress replicas, which count each key's requests together.
    """
    shared = {"checkpoint": str(artifact), "cpus": 0.15}  # all of it fits on one core
    limits = {"ingress_replicas": 2, "key_concurrency": 30, "more_models": {"other": {"checkpoint": str(other)}}}
    limits |= {"picture_hosts": [f"localhost:{host.server_port}"], "picture_networks": ["127.0.0.0/8", "::1/128"]}
    narrow = {"name": "narrow", "auth": "off", "max_ongoing_requests": 1, "max_queued_requests": 2}
    narrow |= {"min_replicas": 2, "max_replicas": 2}
    with running(
        tmp_path_factory.mktemp("service") / "log",
        application("main", "/", **shared, **limits),
        application("narrow", "/narrow", **shared, **narrow),
        http={"ssl_certfile": str(host.certificate), "ssl_keyfile": str(host.key)},
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="200",
    ) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> str:
    return service.url


@pytest.fixture(scope="module")
def cluster(service: Service) -> Iterator[Executor]:
    with driving(service) as driver:
        yield driver


def replicas_of_narrow() -> list[str]:
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if "narrow#ModelReplica" in name]


def kill(names: list[str]) -> None:
    for name in names:
        ray.kill(ray.get_actor(name, namespace="serve"))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


Answer = Callable[[list[Any], list[bytes], int], str | None]


def alone(artifact: Path) -> Answer:
    """The answer by transformers' generate, without engine and HTTP; None where a tie leaves it open."""
    model, processor = MQWenLMHeadModel.from_pretrained(artifact).eval(), MQWenProcessor.from_pretrained(artifact)

    def answer(messages: list[Any], pictures: list[bytes], max_tokens: int) -> str | None:
        ids = encode_chat(processor.tokenizer, messages, add_generation_prompt=True).input_ids
        tokens, tie = generate_alone(model, processor, ids, pictures, max_tokens)
        return None if tie else str(processor.tokenizer.decode(tokens, skip_special_tokens=True))

    return answer


@pytest.fixture(scope="module")
def expected(artifact: Path) -> Answer:
    return alone(artifact)


def image_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def asked(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image_part(picture(number)), {"type": "text", "text": "Which digit?"}]}]


def plain(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}]


def test_the_metrics_are_those_of_the_requests(service: Service, client: openai.OpenAI) -> None:
    """The first test of this file: nothing has been asked before."""
    options: dict[str, Any] = {"model": "tiny", "messages": asked(4), "max_tokens": 6, "temperature": 0}
    begun = time.monotonic()
    whole = client.chat.completions.create(**options)
    *_, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    longest = time.monotonic() - begun
    assert whole.usage is not None
    assert whole.usage == last.usage
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**options | {"model": "none"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**options | {"max_tokens": 10_000}, stream=True)

    tokens = 2 * whole.usage.completion_tokens
    expected = {
        "request_success_total": 2,
        "prompt_tokens_total": 2 * whole.usage.prompt_tokens,
        "generation_tokens_total": tokens,
        "request_queue_time_seconds_count": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": tokens - 2,
        "e2e_request_latency_seconds_count": 2,
        "request_errors_total": 3,
    }

    def values(found: Scrape) -> dict[str, float]:
        return {name: found.total(f"ray_mqwen_{name}", model_name="tiny") for name in expected}

    def at_rest(found: Scrape) -> bool:
        """Each replica says so, the other application's two as well."""
        gauges = ("ray_mqwen_num_requests_running", "ray_mqwen_num_requests_waiting")
        return all(
            found.values(gauge, model_name=name) == [0] * replicas
            for gauge in gauges
            for name, replicas in (("tiny", 1), ("other", 1), ("narrow", 2))
        )

    addresses = discovered(service.folder)
    found = scrape_until(addresses, lambda found: values(found) == expected and at_rest(found))
    # A counter comes with the first that it counts: nothing was preempted, and of the second request the prefix cache
    # had all, its picture too.
    rare = ("ray_mqwen_num_preemptions", "ray_mqwen_mm_cache_hits")
    assert found.declared() == {one for one in declared(serving) if one[0] not in rare}
    errors = [("401", "invalid_api_key"), ("404", "model_not_found"), ("400", "context_length_exceeded")]
    for status, code in errors:
        assert found.total("ray_mqwen_request_errors_total", model_name="tiny", status=status, code=code) == 1
    reason = whole.choices[0].finish_reason
    assert found.total("ray_mqwen_request_success_total", model_name="tiny", finished_reason=reason) == 2
    # Seconds: both requests are in the buckets up to the time that the client waited.
    bound = next(bound for bound in serving.E2E_REQUEST_LATENCY_SECONDS.buckets if bound >= longest)
    for metric in (
        serving.E2E_REQUEST_LATENCY_SECONDS,
        serving.TIME_TO_FIRST_TOKEN_SECONDS,
        serving.REQUEST_QUEUE_TIME_SECONDS,
    ):
        bounds = [one for one in (*metric.buckets, math.inf) if one >= bound]
        assert found.total(f"{metric.exported}_bucket", bound, model_name="tiny") == 2 * len(bounds)


def test_a_conversation_with_pictures(client: openai.OpenAI, expected: Answer) -> None:
    pictures = [picture(1), picture(2), picture(3)]
    parts = [image_part(one) for one in pictures]
    conversation = [
        {"role": "system", "content": "You see pictures. 你会看图。"},
        {"role": "user", "content": [parts[0], {"type": "text", "text": "Which digit?"}, parts[1]]},
        {"role": "assistant", "content": "三"},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, parts[2]]},
    ]
    reply = client.chat.completions.create(model="tiny", messages=conversation, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    own = json.loads(json.dumps(conversation).replace('"image_url", "image_url"', '"image", "image_url"'))
    assert reply.choices[0].message.content == expected(own, pictures, 12)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 3 * 36
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_gives_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": asked(4), "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(deltas) > 3
    bare = list(client.chat.completions.create(**options, stream=True))
    assert all(chunk.usage is None for chunk in bare)


def test_a_stream_on_the_wire(url: str) -> None:
    body = {"model": "tiny", "messages": asked(4), "max_tokens": 4, "stream": True}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_many_at_once_get_the_answers_of_each_alone(url: str, expected: Answer) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:

            async def ask(number: int) -> str:
                options: dict[str, Any] = {"messages": asked(number), "max_tokens": 8, "temperature": 0}
                if number % 2:
                    reply = await client.chat.completions.create(model="tiny", **options)
                    return reply.choices[0].message.content or ""
                stream = await client.chat.completions.create(model="tiny", **options, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, range(24)))

    answers = asyncio.run(main())
    alone = [expected(plain(number), [picture(number)], 8) for number in range(24)]
    assert alone.count(None) <= 3
    assert [answer for answer, one in zip(answers, alone, strict=True) if one] == list(filter(None, alone))
    assert len(set(answers)) > 8


def test_seed_and_stop(client: openai.OpenAI) -> None:
    def ask(number: int, **options: Any) -> str:
        reply = client.chat.completions.create(model="tiny", messages=asked(number), max_tokens=20, **options)  # type: ignore[arg-type]
        return reply.choices[0].message.content or ""

    sampled = [ask(1, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    number = next(number for number in range(30) if len(ask(number, temperature=0)) > 8)
    text = ask(number, temperature=0)
    stop = text[4:6]
    cut = [ask(number, temperature=0, stop=one) for one in (stop, ["nowhere", stop])]
    assert cut == [text[: text.index(stop)]] * 2


def test_models(client: openai.OpenAI, artifact: Path, other: Path) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'none' does not exist"):
        client.models.retrieve("none")
    answers = {}
    for name, folder in (("tiny", artifact), ("other", other)):
        answer, options = alone(folder), {"max_tokens": 8, "temperature": 0}
        found = [client.chat.completions.create(model=name, messages=asked(one), **options) for one in range(6)]  # type: ignore[call-overload]
        texts = [one.choices[0].message.content for one in found]
        assert {one.model for one in found} == {name}
        wanted = [answer(plain(one), [picture(one)], 8) for one in range(6)]
        assert wanted.count(None) < 3
        assert [text for text, one in zip(texts, wanted, strict=True) if one] == list(filter(None, wanted))
        answers[name] = texts
    assert answers["tiny"] != answers["other"]


def test_a_picture_by_its_address(client: openai.OpenAI, host: Host) -> None:
    """The operator allows this host, by its name, and the network that it lies in."""

    def ask(url: str) -> Any:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
        reply = client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)
        return reply.choices[0].message.content, reply.usage

    by_name = f"https://localhost:{host.server_port}"
    assert ask(f"{by_name}/picture") == ask(image_part(picture(1))["image_url"]["url"])
    asked_before = len(host.asked)
    with pytest.raises(openai.BadRequestError, match="Picture 1 is not fetched: its host is not one") as refused:
        ask(f"https://127.0.0.1:{host.server_port}/picture")
    assert refused.value.param == "messages[0].content[0].image_url.url"
    assert len(host.asked) == asked_before


def test_only_tls_is_spoken_and_only_with_this_certificate(url: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https://", "http://") + "/health")
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{url}/health", verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # trusts nobody


def test_the_client_raises_what_openai_would(url: str, client: openai.OpenAI) -> None:
    for key in ("sk-wrong", hash_key(KEY)):
        with pytest.raises(openai.AuthenticationError, match="not known") as raised:
            client.with_options(api_key=key).models.list()
        assert raised.value.code == "invalid_api_key"
    content = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="not fetched") as bad:
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": content}],
                stream=stream,  # type: ignore[call-overload]
            )
        assert bad.value.param == "messages[0].content[0].image_url.url"
        content[0] = image_part(b"none")
        with pytest.raises(openai.BadRequestError, match="no picture"):
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": content}],
                stream=stream,  # type: ignore[call-overload]
            )
        content[0] = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}


def test_probes_need_no_key_and_requests_have_ids(url: str) -> None:
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        response = httpx.get(url + path)
        assert (response.status_code, response.json()) == (200, {"status": status})
        assert response.headers["x-request-id"]
    response = httpx.get(f"{url}/v1/models", headers={"x-request-id": "mine"})
    assert response.status_code == 401
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_request_can_be_followed(url: str, service: Service, collector: Collector) -> None:
    """By its id: in the reply, in the logs of all that it passed, which are JSON, and in the traces."""
    body = {"model": "tiny", "messages": asked(1), "max_tokens": 2}
    headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "followed"}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "followed"
    assert response.json()["id"] == "chatcmpl-followed"

    def logged() -> set[str]:
        logs = (service.folder / "ray").glob("session_2*/logs/serve/replica_main_*.log")
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        return {line["deployment"] for line in lines if line.get("request_id") == "followed"}

    passed = {"Ingress", "KeyLimits", "ModelReplica"}
    deadline = time.monotonic() + 30
    while (found := (logged(), collector.of_request("followed"))) != ({f"main_{one}" for one in passed}, passed):
        assert time.monotonic() < deadline, (found, collector.spans)
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generation(url: str, cluster: Executor, stream: bool) -> None:
    async def ask() -> dict[str, Any]:
        return await asyncio.wrap_future(cluster.submit(stats))

    before = cluster.submit(stats).result()
    body = {"model": "tiny", "messages": asked(1), "stream": stream, "max_tokens": 400, "temperature": 2, "seed": 1}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
            if stream:
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    await anext(response.aiter_lines())
                return
            request = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await until(ask, lambda stats: stats["running"] > 0)
            request.cancel()

    async def main() -> None:
        for left in range(1, 21):  # where others compute, an answer can be complete before its client is seen to leave
            await leave()
            await until(ask, lambda stats: stats["running"] == stats["waiting"] == 0)
            after = await ask()
            aborted, finished = (after[name] - before[name] for name in ("aborted", "finished"))
            assert aborted + finished == left
            if aborted:
                return
        pytest.fail("20 clients left, and none of their generations was aborted")

    asyncio.run(main())


@pytest.mark.parametrize("headers", [{"x-long": "x" * 100_000}, {f"x-{n}": "x" * 100 for n in range(1000)}])
def test_huge_headers_reach_nobody(url: str, headers: dict[str, str]) -> None:
    response = httpx.get(f"{url}/v1/models", headers=headers | {"Authorization": f"Bearer {KEY}"})
    assert response.status_code in (400, 431)
    assert httpx.get(f"{url}/health").status_code == 200


def test_one_key_over_two_ingresses(url: str) -> None:
    """401 without a key and with a wrong one, 429 over the limit: all in OpenAI's form."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "总和"}], "max_tokens": 200, "temperature": 2}

    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

            async def ask(number: int, key: str | None = KEY) -> httpx.Response:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                return await client.post("/v1/chat/completions", json=body | {"seed": number}, headers=headers)

            return await asyncio.gather(ask(0, None), ask(1, "sk-wrong"), *map(ask, range(38)))

    missing, wrong, *others = asyncio.run(main())
    assert [missing.status_code, wrong.status_code] == [401, 401]
    assert missing.json()["error"]["code"] == "missing_api_key"
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    refused = [one for one in others if one.status_code != 200]
    assert 1 <= len(refused) <= 8  # of 38 at once 30 are let in, by both ingresses together
    for one in refused:
        assert one.status_code == 429
        assert one.headers["retry-after"] == "1"
        error = one.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "concurrency_limit_exceeded")


async def until(ask: Callable[[], Any], condition: Callable[[Any], bool]) -> None:
    async with asyncio.timeout(120):  # a new replica's imports take half a minute where others compute
        while not condition(await ask()):
            await asyncio.sleep(0.005)


def test_above_the_queue_is_429_and_below_it_an_answer(url: str) -> None:
    body = {"model": "narrow", "messages": [{"role": "user", "content": "总和"}], "max_tokens": 300, "temperature": 2}

    def ask(number: int) -> httpx.Response:
        return httpx.post(f"{url}/narrow/v1/chat/completions", json=body | {"seed": number}, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(12)))
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert response.json()["error"]["code"] == "queue_full"


def test_a_killed_replica_is_503_and_replaced(url: str, cluster: Executor) -> None:
    body = {"model": "narrow", "messages": [{"role": "user", "content": "总和"}], "max_tokens": 400, "temperature": 2}
    names = cluster.submit(replicas_of_narrow).result()
    assert len(names) == 2
    lines = []
    with httpx.stream(
        "POST", f"{url}/narrow/v1/chat/completions", json=body | {"stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 1:
                cluster.submit(kill, names).result()
    assert lines[-2] == "data: [DONE]"
    error = json.loads(lines[-4].removeprefix("data: "))["error"]
    assert error["code"] == "replica_gone"
    assert "Try again" in error["message"]
    with httpx.Client(base_url=f"{url}/narrow", timeout=60) as client:

        async def status() -> int:
            return client.get("/ready").status_code

        asyncio.run(until(status, lambda status: status == 200))
        assert client.post("/v1/chat/completions", json=body | {"max_tokens": 2}).status_code == 200


def test_ctrl_c_ends_everything_that_was_started(service: Service, cluster: Executor) -> None:
    """The last test of this file: afterwards there is no service."""
    cluster.shutdown()  # a guest, which is not the service's
    started = service.processes()
    assert len(started) > 8
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(timeout=60) == 0
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left, [one.name() for one in left]
