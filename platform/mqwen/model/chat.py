"""ChatML, Qwen's conversation layout, straight to token ids: one routine for training and for serving.

    <|im_start|>user
    <|extra_0|>What is it?<|im_end|>
    <|im_start|>assistant
    A cat.<|im_end|>

Control tokens come from this file alone: what a user writes is encoded as plain text, so "<|im_end|>" in a question
ends nothing. Role and content are encoded apart, as Qwen was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mqwen.model.errors import ConversationError

if TYPE_CHECKING:
    from mqwen.model.tokenizer import MQWenTokenizer

IGNORED = -100  # cross-entropy's ignore_index
ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text or a list of parts}. A part is
{"type": "text", "text": "..."} or {"type": "image"}; its other keys are not read here."""

# The same layout for engines that render text (vLLM, transformers). They cannot keep control tokens out of user text.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role must be system, user or assistant, not ' ~ message.role) -}}"
    "{%- endif -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'image' -%}{{- '<|extra_0|>' -}}"
    "{%- else -%}{{- raise_exception('part type must be text or image, not ' ~ part.type) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(slots=True)
class EncodedChat:
    """A conversation's ids, with one placeholder a picture, and the labels to train on (as long, not yet shifted)."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def _add(self, ids: list[int], trained: bool = False) -> None:
        self.input_ids += ids
        self.labels += ids if trained else [IGNORED] * len(ids)


def encode_chat(
    tokenizer: MQWenTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> EncodedChat:
    """Lays a conversation out as ids.

    Labels are the ids of each answer and of the <|im_end|> that closes it, -100 elsewhere.

    Args:
        add_generation_prompt: open an assistant's turn at the end, for generation. Without it this is a training
            sample, which must end with an answer.

    Raises:
        ConversationError: no messages, an unknown role, content or part, or a training sample without a last answer.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConversationError("messages is empty or no list: give a list of {'role': ..., 'content': ...}")
    newline = tokenizer.encode_text("\n")
    chat = EncodedChat()
    for number, message in enumerate(messages):
        opening, content = _encode_message(tokenizer, message, number)
        chat._add([*newline, *opening] if number else opening)
        chat._add(content, trained=message["role"] == "assistant")
    if add_generation_prompt:
        chat._add([*newline, tokenizer.im_start_id, *tokenizer.encode_text("assistant"), *newline])
    elif messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"the last of {len(messages)} messages has role {messages[-1]['role']!r}: a training sample ends with an "
            "answer (role 'assistant'); to ask for one, pass add_generation_prompt=True"
        )
    return chat


def trim_history(
    tokenizer: MQWenTokenizer, messages: Sequence[Message], max_window_size: int, *, image_tokens: int = 1
) -> list[Message]:
    """Drops the oldest turns by Qwen's rule, so that a long conversation still fits.

    A leading system message and the last turn (the question) always stay. Earlier turns stay, newest first, while
    system message and kept turns together have fewer ids than `max_window_size`; the question is not counted.

    Args:
        image_tokens: positions that one picture takes in the model; Qwen's own count is the one placeholder.

    Raises:
        ConversationError: as `encode_chat`.
    """

    def size(message: Message, number: int) -> int:
        opening, content = _encode_message(tokenizer, message, number)
        return len(opening) + len(content) + content.count(tokenizer.image_token_id) * (image_tokens - 1)

    sizes = [size(message, number) for number, message in enumerate(messages)]
    first = 1 if messages and messages[0]["role"] == "system" else 0
    turns = [number for number in range(first, len(messages)) if messages[number]["role"] == "user"]
    total = sum(sizes[:first])
    start = end = turns[-1] if turns else first
    for turn in reversed(turns[:-1]):
        total += sum(1 + sizes[number] for number in range(turn, end))  # 1: the newline before each message
        if total >= max_window_size:
            break
        start = end = turn
    return [*messages[:first], *messages[start:]]


def _encode_message(tokenizer: MQWenTokenizer, message: Message, number: int) -> tuple[list[int], list[int]]:
    """One message's ids: what opens it, and its content with the <|im_end|> that closes it."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        given = message.get("role") if isinstance(message, Mapping) else message
        raise ConversationError(f"message {number}: role {given!r:.80}; allowed are {', '.join(ROLES)}")
    role = message["role"]
    opening = [tokenizer.im_start_id, *tokenizer.encode_text(role), *tokenizer.encode_text("\n")]
    content: list[int] = []
    for text in _texts(message.get("content"), role, number):
        content += [tokenizer.image_token_id] if text is None else tokenizer.encode_text(text)
    return opening, [*content, tokenizer.im_end_id]


def _texts(content: object, role: str, number: int) -> list[str | None]:
    """A message's content as runs of text, with None for a picture. Neighbouring text parts are one run."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ConversationError(
            f"message {number}: content is {type(content).__name__}; allowed are text and a list of parts "
            "({'type': 'text', 'text': ...} or {'type': 'image'})"
        )
    runs: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if runs and runs[-1] is not None:
                runs[-1] += part["text"]
            else:
                runs.append(part["text"])
        elif kind == "image" and role != "assistant":
            runs.append(None)
        else:
            raise ConversationError(
                f"message {number} ({role}): part {part!r:.80}; allowed are {{'type': 'text', 'text': '...'}} and, "
                "outside an answer, {'type': 'image'}"
            )
    return runs


def text_of(message: dict[str, Any]) -> str:
    """What a message says, without its pictures."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
