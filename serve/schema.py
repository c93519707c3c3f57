"""The API's requests, as OpenAI's. A parameter that this server does not implement is refused."""

import base64
import re
from dataclasses import dataclass
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
HTTPS = re.compile(r"https://", re.IGNORECASE)
REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


@dataclass(frozen=True)
class RemotePicture:
    """A picture to be fetched; serve/remote.py decides whether it is."""

    url: str


def _picture(url: Any) -> bytes | RemotePicture:
    """A picture file's bytes from a data URL, or an https URL."""
    if not isinstance(url, str):
        raise ValueError("expected a string")
    if HTTPS.match(url):
        return RemotePicture(url)
    if REMOTE.match(url):
        raise ValueError("pictures are not fetched from such addresses; send a data URL (data:image/...;base64,...)")
    if not (head := DATA_URL.match(url)):
        raise ValueError("expected a data URL of a picture (data:image/...;base64,...)")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise ValueError("the data URL's base64 is broken") from error
    if not content:
        raise ValueError("the data URL holds no picture")
    return content


PictureURL = Annotated[
    bytes | RemotePicture, BeforeValidator(_picture), WithJsonSchema({"type": "string", "format": "uri"})
]


class ImageURL(Strict):
    url: PictureURL = Field(description="data:image/png;base64,... of a picture file, or https:// of an allowed host")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted; every picture has one resolution.")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _content_kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


Nothing = Annotated[list[Any], Field(max_length=0)]


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
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[\w-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted; every answer follows its schema.")


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatCompletionRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    # Not OpenAI's; named as vLLM has them.
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)

    # Accepted where they ask for nothing that this server does not do.
    n: Literal[1] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
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
    def _options_need_others(self) -> "ChatCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.json_schema
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None


class TokenizeRequest(Strict):
    """Either a text or a conversation, as vLLM's /tokenize."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=256)
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self
