"""A tiny artifact, and the application in this process: the replica's own code behind the HTTP side, without Ray."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import torch

from mqwen.engine.request import RequestError
from serve.replica import ModelReplica
from serve.settings import ModelSettings
from serve.task import ChatTask, Chunk, TokenizeTask, Tokens
from tests.engine.tiny import build_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # the model is tiny, and more threads would wait for one another
    return build_artifact(tmp_path_factory.mktemp("serve") / "tiny")


class LocalBackend:
    """`backend.Backend` over a replica in this process."""

    def __init__(self, replica: ModelReplica) -> None:
        self.replica = replica

    async def generate(self, task: ChatTask) -> AsyncGenerator[Chunk]:
        async for item in self.replica.generate(task):
            if isinstance(item, RequestError):
                raise item
            yield item

    async def tokenize(self, task: TokenizeTask) -> Tokens:
        found = await self.replica.tokenize(task)
        if isinstance(found, RequestError):
            raise found
        return found

    async def is_ready(self) -> bool:
        return await self.replica.is_ready()


@pytest.fixture(scope="session")
def replica(artifact: Path) -> Iterator[ModelReplica]:
    replica = ModelReplica(ModelSettings(checkpoint=artifact))
    yield replica
    asyncio.run(replica.engine.drain())
