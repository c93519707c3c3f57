"""The chat API's requests and replies, as OpenAI's. A parameter that this server does not implement is refused."""

import base64
import re
import time
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

DATA_URL = re.compile(r"data:image/[\w.+-]{1,32};base64,", re.IGNORECASE)
REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _picture_bytes(url: Any) -> bytes:
    """A picture file's bytes from a data URL."""
    if not isinstance(url, str):
        raise ValueError("expected a string")
    if REMOTE.match(url):
        raise ValueError("pictures are not fetched from remote addresses; send a data URL (data:image/...;base64,...)")
    if not (head := DATA_URL.match(url)):
        raise ValueError("expected a data URL of a picture (data:image/...;base64,...)")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise ValueError("the data URL's base64 is broken") from error
    if not content:
        raise ValueError("the data URL holds no picture")
    return content


DataURL = Annotated[bytes, BeforeValidator(_picture_bytes), WithJsonSchema({"type": "string", "format": "uri"})]


class ImageURL(Strict):
    url: DataURL = Field(description="data:image/png;base64,... of a picture file")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted; every picture has one resolution.")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _content_kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str


class UserMessage(Strict):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts"), Field(min_length=1)],
        Discriminator(_content_kind),
    ]


class AssistantMessage(Strict):
    """Also as replies have it: clients append those to the conversation as they are."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatCompletionRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted where they ask for nothing that this server does not do.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None
    # For the operator of a service, not for the model.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 4:
            raise ValueError("at most 4 stop sequences")
        return stop

    @model_validator(mode="after")
    def _options_need_stream(self) -> "ChatCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Reply:
    """The JSON objects of one answer: the whole of it, or chunk by chunk."""

    def __init__(self, completion_id: str, model: str) -> None:
        self.model = model
        self._head = {"id": completion_id, "created": int(time.time()), "model": model}

    def completion(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}
