"""A chat on its way from the HTTP side to a replica, and what comes back."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatTask:
    """messages: as `mqwen.model.chat` takes them. pictures: files' bytes, in order.

    options: the rest of an engine's request, as `mqwen.engine.request.Request` names it. stream: give each event as it
    comes; otherwise one event with the whole answer. affinity: tasks of the same one have a prefix or pictures in
    common, which a replica that had one of them still holds.
    """

    messages: list[dict[str, Any]]
    pictures: list[bytes]
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    affinity: str = ""


@dataclass(frozen=True)
class TokenizeTask:
    """Text, or messages (with `pictures` placeholders in them) as a chat."""

    text: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids: one placeholder a picture. positions: what they take of the context, of max_length in all."""

    ids: list[int]
    positions: int
    max_length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was added to an answer. logprobs: one entry a token, in OpenAI's form, where asked for."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[dict[str, Any], ...] = ()
