"""What goes into the engine and what comes out: requests, token events, and the errors that belong to one request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    """One generation.

    input_ids: the prompt, one placeholder token a picture (not yet expanded to image positions).
    pictures: in the order of the placeholders; a picture file's bytes, or pixels as uint8 (3, height, width) of the
        size that the vision tower takes.
    max_tokens: most tokens to generate; None takes what the context leaves.
    temperature: 0 is greedy. top_p: the share of probability that is sampled from, (0, 1].
    seed: the same seed samples the same tokens, alone and in company. None draws one.
    stop: texts that end the generation; they are not part of the output.
    """

    request_id: str
    input_ids: Sequence[int]
    pictures: Sequence[bytes | NDArray[np.uint8]] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step added to a request.

    token_ids: sampled in this step, the stop token included. text: what they made readable; empty while a character
    or a possible stop text is incomplete. finish_reason: None until the last event. prompt_tokens: positions of the
    prompt, pictures expanded. completion_tokens: tokens generated so far.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int


def join(events: Sequence[TokenEvent]) -> TokenEvent:
    """All of an answer as one event."""
    last = events[-1]
    token_ids = tuple(token for event in events for token in event.token_ids)
    text = "".join(event.text for event in events)
    return TokenEvent(token_ids, text, last.finish_reason, last.prompt_tokens, last.completion_tokens)


class RequestError(ValueError):
    """This request cannot be served as it is; the engine and all others go on.

    The message is safe to show to whoever sent the request. `param` names the field at fault, as `Request` names it.
    """

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # both in args: the error survives pickling between processes
        self.message, self.param = message, param

    def __str__(self) -> str:
        return self.message


class ContextLengthError(RequestError):
    """The prompt and the tokens asked for can never fit into the context."""

    code = "context_length_exceeded"


class InvalidPictureError(RequestError):
    """A picture that is none, is too large, or whose count does not match the placeholders."""

    code = "invalid_image"


class EngineClosedError(RuntimeError):
    """The engine drains or has ended; another replica may take the request."""


class EngineFailedError(RuntimeError):
    """A step failed through no fault of the request (out of memory, a bug); the engine's log has the trace."""
