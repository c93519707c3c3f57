"""The forms in which datasets hold conversations, as chat messages (see model/chat.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mqwen.data.errors import SampleError

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MARKER = "<image>"
_NO_TEXT = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes

CAPTIONS = ("txt", "text", "caption")  # names that a bare caption goes by

Message = dict[str, Any]


def from_llava(turns: Any) -> list[Message]:
    """LLaVA's turns, {"from": "human" | "gpt" | "system", "value": text with an <image> for each picture}."""
    if not isinstance(turns, list):
        raise SampleError("conversation", f"'conversations' is {type(turns).__name__}; a list of turns is allowed")
    return [_message(turn) for turn in turns]


def from_caption(caption: Any, question: str) -> list[Message]:
    """A picture's caption as the answer to `question`."""
    if not isinstance(caption, str) or not caption.strip():
        raise SampleError("conversation", f"the caption is {caption!r:.200}; a text is allowed")
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": caption.strip()}]


def from_fields(fields: Mapping[str, Any], question: str) -> list[Message]:
    """The conversation of a record with named fields: `messages` (ours), `conversations` (LLaVA's), or a caption."""
    if (messages := fields.get("messages")) is not None:
        if not isinstance(messages, list) or not messages:
            raise SampleError("conversation", f"'messages' is {messages!r:.80}; a list of messages is allowed")
        return messages
    if (turns := fields.get("conversations")) is not None:
        return from_llava(turns)
    for name in CAPTIONS:
        if (caption := fields.get(name)) is not None:
            return from_caption(caption[0] if isinstance(caption, list) and caption else caption, question)
    allowed = ", ".join(("messages", "conversations", *CAPTIONS))
    raise SampleError("conversation", f"none of the fields {', '.join(fields)!r:.200} holds one; allowed are {allowed}")


def check_text(messages: list[Message]) -> None:
    """Raises SampleError where text was made of bytes that are not UTF-8."""
    if found := _NO_TEXT.search(json.dumps(messages, ensure_ascii=False)):
        raise SampleError("text", f"its text holds the byte 0x{ord(found[0]) - 0xDC00:02x}, which is not UTF-8")


def to_json(value: Any, sort_keys: bool = False) -> bytes:
    """UTF-8 even where text holds half of a surrogate pair, which JSON can write as an escape and UTF-8 cannot."""
    return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys).encode("utf-8", "backslashreplace")


def _message(turn: Any) -> Message:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise SampleError(
            "conversation", f"a turn is {turn!r:.200}; allowed is 'from' {', '.join(_ROLES)} with a text as 'value'"
        )
    return {"role": _ROLES[role], "content": _parts(text)}


def _parts(text: str) -> list[dict[str, str]]:
    """Text with markers as parts; the line breaks that LLaVA's files put around a marker are dropped."""
    parts: list[dict[str, str]] = []
    for n, piece in enumerate(text.split(_MARKER)):
        if n:
            parts.append({"type": "image"})
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts
