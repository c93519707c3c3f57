"""From a request as OpenAI's to the engine's terms: pictures out of the messages, options by the engine's names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import ApiError
from serve.schema import ChatCompletionRequest, ImagePart, Message, RemotePicture


@dataclass(frozen=True)
class Conversation:
    """messages: as `mqwen.model.chat` takes them. fields: what the request calls each picture, by `pictures[i]`."""

    messages: list[dict[str, Any]]
    pictures: list[bytes | RemotePicture]
    fields: dict[str, str]


def conversation(given: Sequence[Message], max_pictures: int) -> Conversation:
    """Raises ApiError where there are too many pictures."""
    messages: list[dict[str, Any]] = []
    pictures: list[bytes | RemotePicture] = []
    fields: dict[str, str] = {}
    for number, message in enumerate(given):
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
    return Conversation(messages, pictures, fields)


def options(body: ChatCompletionRequest, adapter: str | None, key: str) -> dict[str, Any]:
    """What was asked for; what was not is the engine's to decide, but for temperature, whose default is OpenAI's."""
    asked = {
        "max_tokens": body.limit,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": body.seed,
        "json_schema": body.schema_of_answer,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "adapter": adapter,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return given | {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "stop": body.stops,
        "key": key,
    }


def affinity(adapter: str | None, messages: Sequence[dict[str, Any]], pictures: Sequence[bytes]) -> str:
    """Equal for all turns of a conversation, and for conversations that begin with the same pictures.

    Pictures cost the most, so where the first user's turn has some, they alone decide; else the text up to there does.
    """
    digest = hashlib.sha256(repr(adapter).encode())
    for message in messages:
        content = message["content"]
        shown = 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
        if message["role"] == "user" and shown:
            digest = hashlib.sha256(repr(adapter).encode())
            for picture in pictures[:shown]:
                digest.update(hashlib.sha256(picture).digest())
            break
        digest.update(repr(message).encode())
        if message["role"] == "user":
            break
    return digest.hexdigest()
