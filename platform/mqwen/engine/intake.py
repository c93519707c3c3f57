"""What a request must pass before the engine's thread sees it."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mqwen.engine.adapters import Adapters
from mqwen.engine.grammar import GrammarCompiler
from mqwen.engine.outbox import Outbox
from mqwen.engine.pictures import PictureEncoder
from mqwen.engine.request import (
    ContextLengthError,
    InvalidGrammarError,
    InvalidPictureError,
    Request,
    RequestError,
    UnknownAdapterError,
)
from mqwen.engine.rotary import RotaryTable
from mqwen.engine.sequence import Sequence, expand_pictures
from mqwen.engine.text import TextStream, token_bytes

if TYPE_CHECKING:
    from mqwen.model import MQWenConfig, MQWenTokenizer

MAX_LOGPROBS = 20  # as in OpenAI's API


class Intake:
    """max_length: most positions of a sequence, prompt and answer."""

    def __init__(
        self,
        config: "MQWenConfig",
        tokenizer: "MQWenTokenizer",
        pictures: PictureEncoder,
        adapters: Adapters,
        rotary: RotaryTable,
        max_length: int,
    ) -> None:
        self._pictures, self._adapters, self._rotary = pictures, adapters, rotary
        self._vocabulary, self._image, self._width = config.vocab_size, config.image_token_id, config.image_positions
        self._max_length = max_length
        self._grammars = GrammarCompiler(tokenizer, config.vocab_size)
        self._token_bytes = token_bytes(tokenizer)

    def check(self, request: Request, outbox: Outbox) -> Sequence:
        """What can be known of a request before any work is done for it. Raises RequestError and its kinds."""
        _check_options(request)
        if request.adapter is not None and request.adapter not in self._adapters.numbers:
            known = ", ".join(self._adapters.numbers) or "none"
            raise UnknownAdapterError(f"adapter {request.adapter!r} is not loaded; there are: {known}", "adapter")
        ids = _token_ids(request)
        wrong = ids[(ids < 0) | (ids >= self._vocabulary)]
        if not len(ids) or len(wrong):
            message = (
                f"token {wrong[0]} is not in the vocabulary of {self._vocabulary}"
                if len(ids)
                else "the prompt is empty"
            )
            raise RequestError(message, "input_ids")
        ids, starts = expand_pictures(ids, self._image, self._width)
        if len(starts) != len(request.pictures):
            message = f"{len(request.pictures)} pictures were given for {len(starts)} placeholders in the prompt"
            raise InvalidPictureError(message, "pictures")
        room = self._max_length - len(ids)
        limit = room if request.max_tokens is None else request.max_tokens
        if limit < 1 or limit > room:
            asked = "" if request.max_tokens is None else f" and {request.max_tokens} tokens to generate are asked for"
            message = f"the prompt has {len(ids)} positions{asked}; the context has {self._max_length} for both"
            raise ContextLengthError(message, "input_ids" if room <= 0 else "max_tokens")
        sequence = Sequence(request, ids, starts, limit, TextStream(self._token_bytes, request.stop), outbox)
        sequence.alpha = self._rotary.alpha(len(ids))
        return sequence

    def loads(self, sequence: Sequence) -> bool:
        """Whether `load` has anything to do."""
        request = sequence.request
        return bool(request.pictures) or request.json_schema is not None or request.regex is not None

    async def load(self, sequence: Sequence) -> bool:
        """Decodes its pictures and compiles its grammar, in threads. False where that failed the request."""
        request = sequence.request
        try:
            sequence.pictures = await self._pictures.load(request.pictures, request.adapter)
            if request.json_schema is not None or request.regex is not None:
                sequence.grammar = await asyncio.to_thread(self._grammars.compile, request)
        except RequestError as error:
            sequence.outbox.fail(error)
            return False
        return True


def _token_ids(request: Request) -> NDArray[np.int64]:
    """Raises RequestError where they are none: no flat list, fractions, or numbers that no int64 holds."""
    try:
        ids = np.array(request.input_ids)
    except ValueError:  # lists of different lengths
        ids = np.array(request.input_ids, dtype=object)
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind not in "iu" or ids.max() > np.iinfo(np.int64).max)):
        raise RequestError("input_ids must be a list of token numbers", "input_ids")
    return ids.astype(np.int64)


def _check_options(request: Request) -> None:
    def require(holds: bool, message: str, param: str) -> None:
        if not holds:
            raise RequestError(f"{param} {message}", param)

    require(request.max_tokens is None or request.max_tokens > 0, "must be at least 1", "max_tokens")
    require(0 <= request.temperature < float("inf"), "must be a number from 0", "temperature")
    require(0 < request.top_p <= 1, "must be above 0 and at most 1", "top_p")
    require(request.top_k >= 0, "must not be negative", "top_k")
    require(0 <= request.min_p <= 1, "must be from 0 to 1", "min_p")
    require(0 < request.repetition_penalty < float("inf"), "must be above 0", "repetition_penalty")
    require(abs(request.presence_penalty) < float("inf"), "must be a number", "presence_penalty")
    require(abs(request.frequency_penalty) < float("inf"), "must be a number", "frequency_penalty")
    if request.logprobs is not None:
        require(0 <= request.logprobs <= MAX_LOGPROBS, f"must be from 0 to {MAX_LOGPROBS}", "logprobs")
    require("" not in tuple(request.stop), "must not hold an empty text", "stop")
    if request.json_schema is not None and request.regex is not None:
        raise InvalidGrammarError("json_schema and regex are both given; the answer can follow one of them", "regex")
