"""One request on its way through the engine."""

import asyncio
import time
from random import Random

from mqwen.engine.pictures import Picture
from mqwen.engine.request import FinishReason, Request, TokenEvent
from mqwen.engine.text import TextStream


class Sequence:
    """State of one request. Made on its event loop; once it waits, the engine's thread changes it, `aborted` apart.

    prompt_tokens: positions of the prompt, pictures expanded. limit: most tokens to generate. token_seconds: what the
    newest token took, from the one before or, the first, from the request's arrival.
    """

    def __init__(self, request: Request, prompt_tokens: int, limit: int, text: TextStream) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.pictures: list[Picture] = []
        self.temperature = request.temperature
        self.top_p = request.top_p
        self.random = Random(request.seed)
        self.newest = 0  # the token sampled last
        self.completion_tokens = 0
        self.arrived = self._token_at = time.perf_counter()
        self.token_seconds = 0.0
        self.finish_reason: FinishReason | None = None
        self.aborted = False
        self._text = text
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()

    @property
    def positions(self) -> int:
        """Places in the cache that this sequence may come to fill."""
        return self.prompt_tokens + self.limit

    def add(self, token: int, stop_ids: frozenset[int]) -> None:
        """Takes a sampled token and tells the reader; afterwards `finish_reason` says whether it was the last."""
        self.newest = token
        self.completion_tokens += 1
        now = time.perf_counter()
        self.token_seconds, self._token_at = now - self._token_at, now
        text = "" if token in stop_ids else self._text.push(token)
        if token in stop_ids or self._text.stopped:
            self.finish_reason = "stop"
        elif self.completion_tokens == self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._text.flush()
        self._post(TokenEvent((token,), text, self.finish_reason, self.prompt_tokens, self.completion_tokens))

    def end_aborted(self) -> None:
        self.finish_reason = "abort"
        self._post(TokenEvent((), "", "abort", self.prompt_tokens, self.completion_tokens))

    def fail(self, error: Exception) -> None:
        self._post(error)

    def _post(self, event: TokenEvent | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the reader's loop has ended: nobody to tell
            self.aborted = True

    async def next_event(self) -> TokenEvent:
        """Raises what the engine failed with."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event
