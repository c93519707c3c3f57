"""Where chats are answered: what the HTTP side needs of it, and the model deployment as that."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from ray.serve.handle import DeploymentHandle

from mqwen.engine.request import RequestError
from serve.task import ChatTask, Chunk, TokenizeTask, Tokens


class Backend(Protocol):
    """A Serve handle in the application, a replica in tests."""

    def generate(self, task: ChatTask) -> AsyncGenerator[Chunk]:
        """What is generated; closing it ends the generation. Raises RequestError where the task is refused."""

    async def tokenize(self, task: TokenizeTask) -> Tokens:
        """Raises RequestError."""

    async def is_ready(self) -> bool:
        """Whether a chat would be answered now."""


@dataclass(frozen=True)
class Served:
    """What stands behind one name that clients give as "model"."""

    backend: Backend
    adapter: str | None = None


class ReplicaBackend:
    """The model deployment, through its handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(stream=True).generate
        self._tokenize, self._is_ready = handle.tokenize, handle.is_ready

    async def generate(self, task: ChatTask) -> AsyncGenerator[Chunk]:
        response = self._generate.remote(task)
        try:
            async for item in response:
                if isinstance(item, RequestError):
                    raise item
                yield item
        finally:
            response.cancel()  # the client may have left; after the last event it does nothing

    async def tokenize(self, task: TokenizeTask) -> Tokens:
        found = await self._tokenize.remote(task)
        if isinstance(found, RequestError):
            raise found
        return found

    async def is_ready(self) -> bool:
        try:
            return await asyncio.wait_for(self._is_ready.remote(), timeout=5)
        except Exception:  # no replica, a dead one, a full queue: whatever it is, not ready
            return False
