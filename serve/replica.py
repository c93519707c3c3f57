"""The model side: one process (on a GPU, or a share of one) that holds an engine and answers chats."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mqwen.engine.request import ContextLengthError, Request, RequestError, TokenEvent, TokenLogprob
from mqwen.storage import local_folder
from serve.settings import ModelSettings
from serve.task import ChatTask, Chunk, TokenizeTask, Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from mqwen.engine.interface import GenerationEngine
    from mqwen.model import MQWenProcessor

# Seconds that a thread keeps the interpreter where another wants it. The engine's thread gives it up at each call of
# the card, several times in a step of one to three milliseconds; Python's own 5 ms would be the step's length then.
SWITCH = 2e-4


class ModelReplica:
    """Replicas on one node share a copy of the checkpoint.

    Serve itself waits for running requests before it ends a replica, and calls `check_health` and
    `record_autoscaling_stats`.
    """

    def __init__(self, settings: ModelSettings) -> None:
        # Imported here: the driver and the ingress import this module, and need no torch.
        from mqwen.engine.text import token_bytes

        sys.setswitchinterval(SWITCH)
        self.engine: GenerationEngine
        self.engine, processor = _engine(settings, local_folder(settings.checkpoint))
        processor.max_pixels = settings.max_pixels
        self._tokenizer, self._max_answer = processor.tokenizer, settings.max_answer
        self._token_bytes = token_bytes(processor.tokenizer)
        self._stop_ids = frozenset(processor.tokenizer.stop_ids)

    async def generate(self, task: ChatTask) -> AsyncGenerator[Chunk | RequestError]:
        """What is generated. A refused request is an item, not an exception, which Serve would log as ours."""
        try:
            request = await asyncio.to_thread(self._request, task)  # a long text takes seconds
            if not task.stream:
                yield self._chunk(await self.engine.complete(request))
                return
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    yield self._chunk(event)
        except RequestError as error:
            yield error

    async def tokenize(self, task: TokenizeTask) -> Tokens | RequestError:
        try:
            return await asyncio.to_thread(self._tokens, task)
        except RequestError as error:
            return error

    async def is_ready(self) -> bool:
        return self.engine.health()

    async def stats(self) -> dict[str, int]:
        return asdict(self.engine.stats())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serve/scaling.py scales by, beside the number of requests, which Serve counts itself."""
        stats = self.engine.stats()
        return {"kv_usage": stats.kv_blocks_used / stats.kv_blocks}

    def check_health(self) -> None:
        """An exception gets this replica replaced."""
        if not self.engine.health():
            raise RuntimeError("the engine's thread has ended")

    def _request(self, task: ChatTask) -> Request:
        tokens = self._tokens(TokenizeTask(messages=task.messages))
        options, room = dict(task.options), tokens.max_length - tokens.positions
        if self._max_answer is not None:
            asked = options.get("max_tokens")
            if asked is not None and asked > self._max_answer:
                raise RequestError(
                    f"{asked} tokens are asked for; at most {self._max_answer} are allowed", "max_tokens"
                )
            options["max_tokens"] = asked or min(self._max_answer, max(room, 1))
        return Request(request_id=uuid4().hex, input_ids=tokens.ids, pictures=task.pictures, **options)

    def _tokens(self, task: TokenizeTask) -> Tokens:
        from mqwen.model.chat import ConversationError, encode_chat, text_of

        # Known before a long text is tokenized: NFC makes at most four characters one, and each is a byte or more.
        texts = [text_of(message) for message in task.messages] if task.text is None else [task.text]
        least = sum(map(len, texts)) // (4 * self._tokenizer.longest_token)
        if least > self.engine.max_length:
            message = f"the prompt has {least} tokens or more; the context has {self.engine.max_length}"
            raise ContextLengthError(message, "input_ids")
        if task.text is not None:
            ids = self._tokenizer.encode_text(task.text)
        else:
            try:
                generation = task.add_generation_prompt
                ids = encode_chat(self._tokenizer, task.messages, add_generation_prompt=generation).input_ids
            except ConversationError as error:
                raise RequestError(str(error), param="messages") from error
        pictures = ids.count(self._tokenizer.image_token_id)
        return Tokens(ids, len(ids) + pictures * (self.engine.picture_positions - 1), self.engine.max_length)

    def _chunk(self, event: TokenEvent) -> Chunk:
        logprobs = tuple(self._logprob(one) for one in event.logprobs if one.token_id not in self._stop_ids)
        return Chunk(event.text, event.finish_reason, event.prompt_tokens, event.completion_tokens, logprobs)

    def _logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in one.top]
        return self._token(one.token_id, one.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._token_bytes(token)
        text = content.decode("utf-8", "replace") if content else self._tokenizer.convert_ids_to_tokens(token) or ""
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(content)}  # no JSON has infinity


def _engine(settings: ModelSettings, folder: "Path") -> "tuple[GenerationEngine, MQWenProcessor]":
    if settings.engine == "vllm":
        from mqwen.engine.vllm import VllmEngine
        from mqwen.model import MQWenProcessor

        processor = MQWenProcessor.from_pretrained(folder)
        return VllmEngine(folder, processor, settings.model, kv_cache_bytes=settings.kv_cache_bytes), processor
    from mqwen.engine.engine import Engine, EngineSettings
    from mqwen.engine.loading import load_artifact

    model, processor = load_artifact(folder, gpu=settings.gpus > 0)
    adapters = {name: local_folder(location) for name, location in settings.adapters.items()}
    own = EngineSettings(
        settings.model,
        max_batch_size=settings.max_ongoing_requests,
        adapters=adapters,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_share=min(settings.gpus, 1.0),
        float8=settings.float8,
    )
    return Engine(model, processor, own), processor
