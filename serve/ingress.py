"""The HTTP side: checks a request, hands it to a replica of its model, gives the answer in OpenAI's form."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request, Security
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from mqwen.engine.request import RequestError
from mqwen.telemetry import serving
from serve.backend import ReplicaBackend, Served
from serve.conversation import affinity, conversation, options
from serve.errors import ApiError, add_error_handlers, as_api_error
from serve.guards import KEY, Guards, KeyCounter
from serve.limits import LimitsHandle
from serve.remote import Network, RemotePictures, fetch_all
from serve.reply import Reply, sse
from serve.schema import ChatCompletionRequest, TokenizeRequest
from serve.task import ChatTask, Chunk, TokenizeTask

REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Policy:
    """What the HTTP side lets in, as settings.py has it. key_hashes: None lets everybody in.

    max_requests: that an ingress has at once, None for any number.
    """

    key_hashes: frozenset[str] | None
    max_body_bytes: int
    max_pictures: int
    max_requests: int | None = None
    max_seconds: float = 600
    max_picture_bytes: int = 20 << 20
    picture_hosts: tuple[str, ...] = ()
    picture_networks: tuple[Network, ...] = ()


@serve.ingress()
class Ingress:
    """The deployment that HTTP reaches. Serve takes its ASGI app from `__serve_build_asgi_app__`.

    models: by name, each with the names of its adapters. limits: where keys are counted, or None.
    """

    def __init__(
        self,
        models: dict[str, tuple[DeploymentHandle, tuple[str, ...]]],
        policy: Policy,
        limits: DeploymentHandle | None,
    ) -> None:
        self._models: dict[str, Served] = {}
        for name, (handle, adapters) in models.items():
            backend = ReplicaBackend(handle)
            self._models |= {name: Served(backend)} | {one: Served(backend, one) for one in adapters}
        self._policy, self._limits = policy, LimitsHandle(limits) if limits is not None else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._models, self._policy, self._limits)


def create_app(models: Mapping[str, Served], policy: Policy, counter: KeyCounter | None = None) -> FastAPI:
    """models: by the names that clients give; errors that belong to none of them are the first one's in telemetry."""
    default = next(iter(models))
    guards = Middleware(
        Guards,
        model=default,
        hashes=policy.key_hashes,
        max_body_bytes=policy.max_body_bytes,
        counter=counter,
        max_requests=policy.max_requests,
    )
    # The scheme is for the document and its page at /docs; the guards have looked at the key already.
    scheme = Security(HTTPBearer(auto_error=False))
    app = FastAPI(title="mqwen", redoc_url=None, middleware=[guards], dependencies=[scheme])
    add_error_handlers(app, default)
    remote = RemotePictures(policy.picture_hosts, policy.picture_networks, max_bytes=policy.max_picture_bytes)
    cards = {name: {"id": name, "object": "model", "created": 0, "owned_by": "mqwen"} for name in models}

    def served(name: str) -> Served:
        if name not in models:
            shown = name[:200].encode(errors="replace").decode()  # half a surrogate pair cannot be sent back
            here = ", ".join(f"'{one}'" for one in models)
            message = f"The model '{shown}' does not exist here; this server has {here}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Live: this process answers."""
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> dict[str, str] | JSONResponse:
        """Ready: each model's replicas answer too. If not, that is no failed request, so nothing is raised."""
        backends = {id(one.backend): one.backend for one in models.values()}.values()
        if not all(await asyncio.gather(*(one.is_ready() for one in backends))):
            return ApiError(503, "No model replica is ready.", code="not_ready", retry_after=1).response()
        return {"status": "ready"}

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        served(name)
        return cards[name]

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        model = served(body.model)
        asked = conversation(body.messages, policy.max_pictures)
        pictures = await fetch_all(remote, asked.pictures, asked.fields)
        task = ChatTask(
            messages=asked.messages,
            pictures=pictures,
            options=options(body, model.adapter, request.scope.get(KEY, "")),
            stream=bool(body.stream),
            affinity=affinity(model.adapter, asked.messages, pictures),
        )
        fields = asked.fields | {"input_ids": "messages", "json_schema": "response_format", "max_tokens": "max_tokens"}
        if body.max_completion_tokens is not None:
            fields["max_tokens"] = "max_completion_tokens"
        reply = Reply(f"chatcmpl-{_request_id(request)}", body.model, bool(body.logprobs))
        events = _answer(model, task, fields, body.model, policy.max_seconds)
        if body.stream:
            try:
                first = await anext(events)  # what is wrong with the request shows here, while a status can be sent
            except BaseException:
                await events.aclose()
                raise
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_stream(reply, first, events, with_usage), media_type="text/event-stream")
        async with aclosing(events):
            [answer] = [event async for event in events]  # a task that is not streamed gives one event
        return JSONResponse(reply.completion(answer))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """A prompt's tokens, or a conversation's; `count` is what they take of the context, pictures expanded."""
        model = served(body.model)
        messages = conversation(body.messages or [], policy.max_pictures).messages
        task = TokenizeTask(body.prompt, messages, body.add_generation_prompt)
        try:
            found = await model.backend.tokenize(task)
        except RequestError as error:
            param = "messages" if body.prompt is None else "prompt"
            raise ApiError(400, error.message, param=param, code=error.code) from error
        except Exception as error:
            raise as_api_error(error) from error
        return {"count": found.positions, "max_model_len": found.max_length, "tokens": found.ids}

    return app


def _request_id(request: Request) -> str:
    """The client's own, which Serve also puts into its logs and the reply's headers; one of ours where it is odd."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid4().hex


async def _answer(
    served: Served, task: ChatTask, fields: dict[str, str], model: str, max_seconds: float
) -> AsyncGenerator[Chunk]:
    """The backend's events. What it fails with becomes an ApiError here, refusals in this API's words.

    Not in a handler of the app: Serve replaces handlers for its own errors by some that answer in plain text.
    """
    started, deadline = time.perf_counter(), asyncio.get_running_loop().time() + max_seconds
    async with aclosing(served.backend.generate(task)) as events:
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    break
                yield event
            serving.E2E_REQUEST_LATENCY_SECONDS.observe(time.perf_counter() - started, model_name=model)
        except TimeoutError as error:
            message = f"The request took longer than the limit of {max_seconds:g} seconds."
            raise ApiError(503, message, code="time_limit", retry_after=1) from error
        except RequestError as error:
            param = fields.get(error.param or "", "messages")
            raise ApiError(400, error.message, param=param, code=error.code) from error
        except Exception as error:
            raise as_api_error(error) from error


async def _stream(reply: Reply, first: Chunk, events: AsyncGenerator[Chunk], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The status is sent already, so an error is an event too."""
    try:
        yield sse(reply.opening())
        event = first
        async with aclosing(events):
            if first.text or first.logprobs:
                yield sse(reply.addition(first))
            async for event in events:
                if event.text or event.logprobs:
                    yield sse(reply.addition(event))
        yield sse(reply.end(event))
        if with_usage:
            yield sse(reply.usage(event))
    except ApiError as error:
        error.emit(reply.model)
        yield sse(error.body())
    yield "data: [DONE]\n\n"
