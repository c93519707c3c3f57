"""What a service needs of an engine. There are two: `engine.Engine`, ours, and `vllm.VllmEngine`."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol

from mqwen.engine.request import Request, TokenEvent

if TYPE_CHECKING:
    from mqwen.engine.engine import EngineStats


class GenerationEngine(Protocol):
    """max_length: most positions of a request, prompt and answer. picture_positions: of them, what a picture takes."""

    max_length: int
    picture_positions: int

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Token events until one with a finish_reason. Closing the iterator, or cancelling its reader, aborts.

        Raises RequestError where the request cannot be served, EngineClosedError after `drain`, EngineFailedError
        where the engine failed.
        """

    async def complete(self, request: Request) -> TokenEvent:
        """The whole answer as one event. Raises what `generate` does."""

    def abort(self, request_id: str) -> None:
        """Ends a request, whose iterator then gives a last event with finish_reason "abort". Unknown ids are none."""

    def stats(self) -> "EngineStats":
        """Counts, now and since the start."""

    def health(self) -> bool:
        """False where only a new process helps."""

    async def drain(self) -> None:
        """Refuses new requests, lets the others end, then ends."""
