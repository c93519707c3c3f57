"""From the engine's thread to the event loop that reads, with one call a step for all readers of a loop."""

import asyncio
from collections import deque
from collections.abc import Iterable

from mqwen.engine.request import TokenEvent, join

# About what an event costs on its way to a client by Ray Serve and HTTP. More events than there is time for would queue
# up there, and take the engine's thread its turns at the interpreter: see `Sequence.add`.
EVENT_SECONDS = 5e-4


class Outbox:
    """Events of one request. Made on the reader's loop; `put` belongs to the engine's thread.

    streams: the reader wants events as they come, not only when the last is there.
    """

    def __init__(self, streams: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.streams = streams
        self._events: deque[TokenEvent] = deque()
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """The reader is not told yet: see `tell`."""
        self._events.append(event)

    def fail(self, error: Exception) -> None:
        """Tells the reader at once."""
        self._error = error
        tell([self])

    async def take(self) -> TokenEvent:
        """All that came since. Raises what the request failed with."""
        while not self._events:
            if self._error is not None:
                raise self._error
            await self._ready.wait()
            self._ready.clear()
        events = [self._events.popleft() for _ in range(len(self._events))]
        return events[0] if len(events) == 1 else join(events)

    def wake(self) -> None:
        self._ready.set()


def tell(outboxes: Iterable[Outbox]) -> list[Outbox]:
    """Wakes the readers of these; gives back those whose loop has ended, so that nobody reads them any more."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Outbox]] = {}
    for outbox in outboxes:
        by_loop.setdefault(outbox.loop, []).append(outbox)
    left: list[Outbox] = []
    for loop, ready in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake, ready)
        except RuntimeError:
            left += ready
    return left


def _wake(outboxes: list[Outbox]) -> None:
    for outbox in outboxes:
        outbox.wake()
