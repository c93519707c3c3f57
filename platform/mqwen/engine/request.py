"""What goes into the engine and what comes out: requests, token events, and the errors that belong to one request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    temperature: 0 is greedy. top_p: the share of probability that is sampled from, (0, 1]. top_k: how many of the
        likeliest tokens, 0 is all. min_p: tokens less likely than this share of the likeliest are left out, [0, 1].
    repetition_penalty: above 0; divides what prompt or answer hold already (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty is taken once from the logit of what the answer holds, frequency_penalty as often as it does.
    seed: the same seed samples the same tokens, alone and in company. None draws one.
    stop: texts that end the generation; they are not part of the output. stop_ids: tokens that do, beside the
        tokenizer's own. ignore_eos: neither these nor the tokenizer's own end it.
    logprobs: give each token's log probability, and those of so many likeliest; before temperature and penalties.
    adapter: name of a LoRA adapter that the engine has loaded.
    json_schema, regex: what the answer must match; one of them.
    key: whom the request is for. Keys take turns where requests wait.
    """

    request_id: str
    input_ids: Sequence[int]
    pictures: Sequence[bytes | NDArray[np.uint8]] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    adapter: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a sampled token's probability; `top`: (token, log probability), the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What was added to a request since the event before; one step's, or several steps' for a slow reader, and where
    many requests run.

    token_ids: sampled, the stop token included. text: what they made readable; empty while a character or a possible
    stop text is incomplete. finish_reason: None until the last event. prompt_tokens: positions of the prompt, pictures
    expanded. completion_tokens: tokens generated so far. logprobs: one for each of token_ids, where asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


def join(events: Sequence[TokenEvent]) -> TokenEvent:
    """Events that follow one another as one."""
    last = events[-1]
    token_ids = tuple(token for event in events for token in event.token_ids)
    logprobs = tuple(logprob for event in events for logprob in event.logprobs)
    text = "".join(event.text for event in events)
    return TokenEvent(token_ids, text, last.finish_reason, last.prompt_tokens, last.completion_tokens, logprobs)


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


class UnknownAdapterError(RequestError):
    """No adapter of that name was loaded."""

    code = "unknown_adapter"


class InvalidGrammarError(RequestError):
    """A JSON schema or regular expression that is none, or that cannot be followed."""

    code = "invalid_grammar"


class EngineClosedError(RuntimeError):
    """The engine drains or has ended; another replica may take the request."""


class EngineFailedError(RuntimeError):
    """A step failed through no fault of the request (out of memory, a bug); the engine's log has the trace."""
