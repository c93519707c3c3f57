"""The HTTP side: checks a chat request, hands it to a model replica, gives the answer in OpenAI's form.

It holds no model. `Backend` is what it needs of a replica: a Serve handle in the application, an engine in tests.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from mqwen.engine.request import RequestError, TokenEvent
from mqwen.telemetry import serving
from serve.errors import ApiError, add_error_handlers, as_api_error
from serve.guards import Guards
from serve.replica import ChatTask
from serve.schema import ChatCompletionRequest, ImagePart, Reply, usage


class Backend(Protocol):
    """Where chats are answered."""

    def generate(self, task: ChatTask) -> AsyncGenerator[TokenEvent]:
        """Token events of one chat; closing it ends the generation."""

    async def is_ready(self) -> bool:
        """Whether a chat would be answered now."""


@dataclass(frozen=True)
class Policy:
    """What the HTTP side lets in.

    model: the name that clients ask for. key_hashes: SHA-256 of the keys; None lets everybody in.
    """

    model: str
    key_hashes: frozenset[str] | None
    max_body_bytes: int
    max_pictures: int


class ReplicaBackend:
    """The model deployment, through its handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(stream=True).generate
        self._is_ready = handle.is_ready

    async def generate(self, task: ChatTask) -> AsyncGenerator[TokenEvent]:
        response = self._generate.remote(task)
        try:
            async for item in response:
                if isinstance(item, RequestError):
                    raise item
                yield item
        finally:
            response.cancel()  # the client may have left; after the last event it does nothing

    async def is_ready(self) -> bool:
        try:
            return await asyncio.wait_for(self._is_ready.remote(), timeout=5)
        except Exception:  # no replica, a dead one, a full queue: whatever it is, not ready
            return False


@serve.ingress()
class Ingress:
    """The deployment that HTTP reaches. Serve takes its ASGI app from `__serve_build_asgi_app__`."""

    def __init__(self, replica: DeploymentHandle, policy: Policy) -> None:
        self._backend, self._policy = ReplicaBackend(replica), policy

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._policy)


def create_app(backend: Backend, policy: Policy) -> FastAPI:
    model = policy.model
    guards = Middleware(Guards, model=model, hashes=policy.key_hashes, max_body_bytes=policy.max_body_bytes)
    app = FastAPI(title="mqwen", docs_url=None, redoc_url=None, middleware=[guards])
    add_error_handlers(app, model)
    card = {"id": model, "object": "model", "created": 0, "owned_by": "mqwen"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Live: this process answers."""
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> dict[str, str] | JSONResponse:
        """Ready: a model replica answers too. If not, that is no failed request, so nothing is raised."""
        if not await backend.is_ready():
            return ApiError(503, "No model replica is ready.", code="not_ready", retry_after=1).response()
        return {"status": "ready"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, model)
        return card

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        _check_model(body.model, model)
        task, fields = _task(body, policy.max_pictures)
        reply = Reply(f"chatcmpl-{request.headers.get('x-request-id') or uuid4().hex}", model)
        events = _answer(backend, task, fields, model)
        if body.stream:
            try:
                first = await anext(events)  # what is wrong with the request shows here, while a status can be sent
            except BaseException:
                await events.aclose()
                raise
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_stream(reply, first, events, with_usage), media_type="text/event-stream")
        async with aclosing(events):
            [event] = [event async for event in events]  # a task that is not streamed gives one event
        return JSONResponse(reply.completion(event.text, _finish_reason(event), _usage(event)))

    return app


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        shown = asked[:200].encode(errors="replace").decode()  # half a surrogate pair cannot be sent back
        message = f"The model '{shown}' does not exist here; this server has '{served}'."
        raise ApiError(404, message, param="model", code="model_not_found")


def _task(body: ChatCompletionRequest, max_pictures: int) -> tuple[ChatTask, dict[str, str]]:
    """The request in the engine's terms, pictures taken out of the messages; and what its fields are called here."""
    messages: list[dict[str, Any]] = []
    pictures: list[bytes] = []
    fields = {"input_ids": "messages", "max_tokens": "max_tokens"}
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = "max_completion_tokens"
    for number, message in enumerate(body.messages):
        content: str | list[dict[str, str]]
        if isinstance(message.content, str):
            content = message.content
        else:
            content = []
            for place, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    fields[f"pictures[{len(pictures)}]"] = f"messages[{number}].content[{place}].image_url.url"
                    pictures.append(part.image_url.url)
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if len(pictures) > max_pictures:
        text = f"The request has {len(pictures)} pictures; at most {max_pictures} are allowed."
        raise ApiError(400, text, param="messages", code="too_many_images")
    task = ChatTask(
        messages=messages,
        pictures=pictures,
        max_tokens=body.limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=body.stops,
        stream=bool(body.stream),
    )
    return task, fields


async def _answer(backend: Backend, task: ChatTask, fields: dict[str, str], model: str) -> AsyncGenerator[TokenEvent]:
    """The backend's events. What it fails with becomes an ApiError here, refusals in this API's words.

    Not in a handler of the app: Serve replaces handlers for its own errors by some that answer in plain text.
    """
    started = time.perf_counter()
    async with aclosing(backend.generate(task)) as events:
        try:
            async for event in events:
                yield event
            serving.E2E_REQUEST_LATENCY_SECONDS.observe(time.perf_counter() - started, model_name=model)
        except RequestError as error:
            param = fields.get(error.param or "", "messages")
            raise ApiError(400, error.message, param=param, code=error.code) from error
        except Exception as error:
            raise as_api_error(error) from error


async def _stream(
    reply: Reply, first: TokenEvent, events: AsyncGenerator[TokenEvent], with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. The status is sent already, so an error is an event too."""
    try:
        yield _sse(reply.chunk({"role": "assistant", "content": first.text}))
        event = first
        async with aclosing(events):
            async for event in events:
                if event.text:
                    yield _sse(reply.chunk({"content": event.text}))
        yield _sse(reply.chunk({}, _finish_reason(event)))
        if with_usage:
            yield _sse(reply.usage_chunk(_usage(event)))
    except ApiError as error:
        error.emit(reply.model)
        yield _sse(error.body())
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _finish_reason(event: TokenEvent) -> str:
    if event.finish_reason not in ("stop", "length"):
        raise ApiError(503, "The generation was ended by the server. Try again.", code="aborted", retry_after=1)
    return event.finish_reason


def _usage(event: TokenEvent) -> dict[str, int]:
    return usage(event.prompt_tokens, event.completion_tokens)
