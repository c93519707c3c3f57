"""The model side: one process (on a GPU, or a share of one) that holds an engine and answers chats."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from mqwen.engine.request import ContextLengthError, Request, RequestError, TokenEvent
from mqwen.storage import Location, local_folder


@dataclass(frozen=True)
class ChatTask:
    """A chat as the ingress hands it on. messages: as `mqwen.model.chat` takes them. pictures: files' bytes, in order.

    stream: give each event as it comes; otherwise one event with the whole answer.
    """

    messages: list[dict[str, Any]]
    pictures: list[bytes]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool


class ModelReplica:
    """checkpoint: an artifact; replicas on one node share a copy. model_name: as clients ask for it. gpu: whether Serve
    gave this replica one.

    Serve itself waits for running requests before it ends a replica, and calls `check_health`.
    """

    def __init__(self, checkpoint: Location, model_name: str, gpu: bool) -> None:
        # Imported here: the driver and the ingress import this module, and need no torch.
        from mqwen.engine.engine import Engine, EngineSettings
        from mqwen.model import MQWenLMHeadModel, MQWenProcessor

        folder = local_folder(checkpoint)
        processor = MQWenProcessor.from_pretrained(folder)
        model = MQWenLMHeadModel.from_pretrained(folder).eval()
        self._tokenizer = processor.tokenizer
        self._longest_token = self._tokenizer.longest_token
        self.engine = Engine(model.to("cuda") if gpu else model, processor, EngineSettings(model_name))

    async def generate(self, task: ChatTask) -> AsyncGenerator[TokenEvent | RequestError]:
        """Token events. A refused request is an item, not an exception, which Serve would log as a failure of ours."""
        try:
            request = await asyncio.to_thread(self._request, task)  # a long text takes seconds
            if not task.stream:
                yield await self.engine.complete(request)
                return
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    yield event
        except RequestError as error:
            yield error

    async def is_ready(self) -> bool:
        return self.engine.health()

    async def stats(self) -> dict[str, int]:
        return asdict(self.engine.stats())

    def check_health(self) -> None:
        """An exception gets this replica replaced."""
        if not self.engine.health():
            raise RuntimeError("the engine's thread has ended")

    def _request(self, task: ChatTask) -> Request:
        from mqwen.model.chat import ConversationError, encode_chat, text_of

        # Known before a long text is tokenized: NFC makes at most four characters one, and each is a byte or more.
        least = sum(len(text_of(message)) for message in task.messages) // (4 * self._longest_token)
        if least > self.engine.max_length:
            message = f"the prompt has {least} tokens or more; the context has {self.engine.max_length}"
            raise ContextLengthError(message, "input_ids")
        try:
            input_ids = encode_chat(self._tokenizer, task.messages, add_generation_prompt=True).input_ids
        except ConversationError as error:
            raise RequestError(str(error), param="messages") from error
        return Request(
            request_id=uuid4().hex,
            input_ids=input_ids,
            pictures=task.pictures,
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            top_p=task.top_p,
            seed=task.seed,
            stop=task.stop,
        )
