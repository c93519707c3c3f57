"""Answers that must match a JSON schema or a regular expression, by llguidance."""

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mqwen.engine.request import InvalidGrammarError, Request
from mqwen.engine.text import token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from mqwen.model import MQWenTokenizer


class Grammar:
    """Which tokens may follow, for one request. param: where the request gives it."""

    def __init__(self, matcher: "LLMatcher", param: str) -> None:
        self._matcher, self._param = matcher, param

    @property
    def ended(self) -> bool:
        """Nothing can follow: the answer is whole, or there is a `failure`."""
        return self._matcher.is_stopped()

    @property
    def failure(self) -> InvalidGrammarError | None:
        """Some grammars only show on the way that they are too large to follow."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().strip().splitlines()[0]
        return InvalidGrammarError(f"{self._param} cannot be followed: {reason}", self._param)

    def mask(self, bits: NDArray[np.int32], row: int) -> None:
        """Sets the bits of the allowed tokens in bits[row]: token t is bit t % 32 of number t // 32."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, bits, row)

    def take(self, token: int) -> InvalidGrammarError | None:
        """The token follows; or why nothing can any more."""
        taken = self._matcher.consume_token(token)
        if taken or self.failure is not None:
            return self.failure
        return InvalidGrammarError(f"{self._param} cannot be followed: it refuses token {token}", self._param)


def allowed_tokens(grammars: Sequence[Grammar | None], vocab_size: int) -> NDArray[np.int32] | None:
    """(grammars, vocab_size / 32), a bit a token; None where there are none."""
    if not any(grammars):
        return None
    bits = np.full((len(grammars), -(-vocab_size // 32)), -1, np.int32)
    for row, grammar in enumerate(grammars):
        if grammar is not None:
            grammar.mask(bits, row)
    return bits


class GrammarCompiler:
    """Made once an engine; what it knows of the tokenizer it prepares at the first request that wants it."""

    def __init__(self, tokenizer: "MQWenTokenizer", vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._prepared: Any = None
        self._lock = threading.Lock()

    def compile(self, request: Request) -> Grammar:
        """Takes seconds for the first, and for a large schema: not on an event loop. Raises InvalidGrammarError."""
        from llguidance import LLMatcher

        param = "json_schema" if request.json_schema is not None else "regex"
        try:
            if request.json_schema is not None:
                schema = request.json_schema
                text = LLMatcher.grammar_from_json_schema(schema if isinstance(schema, str) else json.dumps(schema))
            else:
                text = LLMatcher.grammar_from_regex(request.regex or "")
        except (ValueError, TypeError) as error:
            raise InvalidGrammarError(f"{param} is no JSON object: {error}", param) from error
        grammar = Grammar(LLMatcher(self._prepare(), text, log_level=0), param)
        if grammar.failure is None:  # the first mask may cost much, and may fail
            allowed_tokens([grammar], self._vocab_size)
        if grammar.failure is not None:
            raise grammar.failure
        return grammar

    def _prepare(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._prepared is None:
                self._prepared = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)))
            return self._prepared


class _Vocabulary:
    """The tokenizer as llguidance wants it: each token's bytes; 0xFF marks those that are no text."""

    bos_token_id = None

    def __init__(self, tokenizer: "MQWenTokenizer", vocab_size: int) -> None:
        of, words = token_bytes(tokenizer), tokenizer.eod_id
        self.tokens = [of(i) if i < words else b"\xff<|%d|>" % i for i in range(vocab_size)]
        self.special_token_ids = list(range(words, vocab_size))
        self.eos_token_id = tokenizer.im_end_id
        self._encode = tokenizer.encode_text

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
