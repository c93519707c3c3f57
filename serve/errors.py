"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, and never a trace, path or address."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.exceptions import HTTPException as StarletteHTTPException

from mqwen.engine.request import EngineClosedError
from mqwen.telemetry import serving

logger = logging.getLogger("ray.serve")

# How clients tell kinds of failure apart: by status, and by this word.
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
UNAVAILABLE = (
    TaskCancelledError,
    RayActorError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    EngineClosedError,
)


class ApiError(HTTPException):
    """An answer that is an error. An HTTPException, so that FastAPI passes it on wherever it is raised."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if retry_after:
            headers["Retry-After"] = str(retry_after)
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def kind(self) -> str:
        return TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)

    def emit(self, model: str) -> None:
        """To be called where it is sent."""
        serving.REQUEST_ERRORS.add(model_name=model, status=str(self.status_code), code=self.code or self.kind)


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of any error. An unexpected one is logged here, with its trace."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors()[0], error.body)
    if isinstance(error, StarletteHTTPException):  # FastAPI's own: no such route or method, a body that is no JSON
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, BackPressureError):
        return queue_full()
    if isinstance(error, UNAVAILABLE):
        return ApiError(
            503, "The replica that had this request has gone. Try again.", code="replica_gone", retry_after=1
        )
    logger.error("A request failed", exc_info=error)
    return ApiError(500, "The server failed on this request. Its log has the cause.", code="internal_error")


def queue_full() -> ApiError:
    return ApiError(429, "The server is busy: its queue is full. Try again shortly.", code="queue_full", retry_after=1)


def add_error_handlers(app: FastAPI, model: str) -> None:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        answered = as_api_error(error)
        answered.emit(model)
        return answered.response()

    for kind in (StarletteHTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _from_validation(error: Any, body: Any) -> ApiError:
    if error["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    param = _field_path(error["loc"][1:], body, missing=error["type"] == "missing")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if error["type"] == "missing" and param is None:
        return ApiError(400, "A JSON body is required, with Content-Type application/json.", code="missing_body")
    if error["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    where = f"Invalid '{param}': " if param else "Invalid body: "
    return ApiError(400, where + error["msg"].removeprefix("Value error, "), param=param, code="invalid_value")


def _field_path(loc: Sequence[str | int], body: Any, *, missing: bool) -> str | None:
    """pydantic's ("messages", 0, "user", "content", "text") as messages[0].content.

    It names the branches that it took through unions, too ("user", "text"): what the body does not hold is left out,
    unless it is the field that is missing.
    """
    path = ""
    for place, part in enumerate(loc):
        if isinstance(part, int):
            path += f"[{part}]"
            body = body[part] if isinstance(body, list) else None
        elif isinstance(body, dict) and part in body:
            path += f".{part}"
            body = body[part]
        elif missing and place == len(loc) - 1:
            path += f".{part}"
    return path.removeprefix(".") or None
