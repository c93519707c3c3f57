"""From token ids to text as it grows: no broken characters, nothing of a stop text."""

import codecs
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from mqwen.model.vocabulary import CHARACTER_TO_BYTE

if TYPE_CHECKING:
    from mqwen.model import MQWenTokenizer


def token_bytes(tokenizer: "MQWenTokenizer") -> Callable[[int], bytes]:
    """Gives one token's bytes; none for a control token, and for an id past the vocabulary."""

    @lru_cache(maxsize=1 << 16)
    def of(token_id: int) -> bytes:
        if token_id >= tokenizer.eod_id:  # control tokens follow the ranks
            return b""
        return bytes(CHARACTER_TO_BYTE[character] for character in tokenizer.convert_ids_to_tokens(token_id))

    return of


class TextStream:
    """Incremental detokenisation of one sequence.

    A character's bytes may be spread over several tokens (Chinese, emoji): text is given out when it is whole. What
    could be the beginning of a stop text is held back until it is known not to be.

    token_bytes: as the function above makes it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes one token, returns the text that became certain. Sets `stopped` when a stop text is complete."""
        return self._release(self._decoder.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """The rest, when no token follows; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
