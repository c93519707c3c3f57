"""What stands before every route: the key and its limits, the room, the body's size and the time it takes to come."""

import asyncio
from typing import Protocol
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, queue_full
from serve.keys import known_hash
from serve.limits import Refusal

# Probes carry no key, and learn nothing but a word. The API's document and its page say what the code says to anybody.
PUBLIC = frozenset({"/health", "/ready", "/openapi.json", "/docs"})
KEY = "mqwen.key"  # in the scope: whose request it is
HEADER_BYTES = 64 << 10  # of all headers together
BODY_SECONDS = 60.0  # that a client may take to send the next part of a body


class KeyCounter(Protocol):
    """Who counts the requests of keys; `limits.LimitsHandle` in the application."""

    async def enter(self, key: str, request: str) -> Refusal | None:
        """Counts a request, unless it is one too many."""

    async def leave(self, key: str, request: str) -> None:
        """The request has ended."""


class Guards:
    """ASGI middleware.

    hashes: SHA-256 of the keys that may enter; None lets everybody in. counter: None counts nothing. max_requests: at
    once, None for any number. model: for telemetry.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model: str,
        hashes: frozenset[str] | None,
        max_body_bytes: int,
        counter: KeyCounter | None = None,
        max_requests: int | None = None,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._model, self._hashes, self._counter = app, model, hashes, counter
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds
        self._max_requests, self._requests = max_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_length(headers)
            key = scope[KEY] = self._key(headers)
            if self._max_requests is not None and self._requests >= self._max_requests:
                raise queue_full()
        except ApiError as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        self._requests += 1
        try:
            await self._counted(key, scope, receive, send)
        finally:
            self._requests -= 1

    async def _counted(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One of the requests of its key."""
        request = uuid4().hex
        try:
            await self._enter(key, request)
        except ApiError as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            if self._counter is not None:
                await self._counter.leave(key, request)

    async def _refuse(self, refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        refusal.emit(self._model)
        await refusal.response()(scope, receive, send)

    def _key(self, headers: dict[str, str]) -> str:
        if self._hashes is None:
            return ""
        given = headers.get("authorization")
        if given is None:
            raise ApiError(401, "No API key given; send 'Authorization: Bearer KEY'.", code="missing_api_key")
        key = known_hash(given, self._hashes)
        if key is None:
            raise ApiError(401, "The API key given is not known here.", code="invalid_api_key")
        return key

    def _check_length(self, headers: dict[str, str]) -> None:
        if sum(len(name) + len(value) for name, value in headers.items()) > HEADER_BYTES:
            raise ApiError(431, f"The headers are larger than {HEADER_BYTES} bytes.", code="headers_too_large")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()

    async def _enter(self, key: str, request: str) -> None:
        refusal = await self._counter.enter(key, request) if self._counter is not None else None
        if refusal is not None:
            status = 503 if refusal.code == "limits_unavailable" else 429
            raise ApiError(status, refusal.reason, code=refusal.code, retry_after=refusal.retry_after)

    def _limited(self, receive: Receive) -> Receive:
        """A body without a length, or longer than it says, is stopped at the limit; one that does not come, in time."""
        received = 0
        complete = False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what follows is the client's leaving, for which there is no hurry
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._body_seconds)
            except TimeoutError as error:
                raise ApiError(408, "The body did not come in time.", code="body_timeout") from error
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than the limit of {self._max_body_bytes} bytes.", code="body_too_large"
        )
