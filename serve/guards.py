"""What stands before every route: the key and the size of the body, both checked before a body is read."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.keys import is_authorized

PUBLIC = frozenset({"/health", "/ready"})  # probes carry no key, and learn nothing but a word


class Guards:
    """ASGI middleware. hashes: SHA-256 of the keys that may enter; None lets everybody in. model: for telemetry."""

    def __init__(self, app: ASGIApp, *, model: str, hashes: frozenset[str] | None, max_body_bytes: int) -> None:
        self._app, self._model, self._hashes, self._max_body_bytes = app, model, hashes, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            refusal.emit(self._model)
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: dict[str, str]) -> ApiError | None:
        if self._hashes is not None and path not in PUBLIC:
            given = headers.get("authorization")
            if given is None:
                return ApiError(401, "No API key given; send 'Authorization: Bearer KEY'.", code="missing_api_key")
            if not is_authorized(given, self._hashes):
                return ApiError(401, "The API key given is not known here.", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        """A body without a length, or longer than it says, is stopped at the limit."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than the limit of {self._max_body_bytes} bytes.", code="body_too_large"
        )
