"""The engine: requests in on any event loop, one thread that owns the model, token events out.

The way of a request: `generate` checks it and has its pictures decoded in threads; it waits; the engine's thread takes
waiting requests as one batch, encodes their pictures, prefills and decodes them together; rows that finish leave.
Requests that come meanwhile are taken when the batch has ended.
"""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mqwen.engine.batch import Batch
from mqwen.engine.observer import Observer
from mqwen.engine.pictures import PictureEncoder
from mqwen.engine.request import (
    ContextLengthError,
    EngineClosedError,
    EngineFailedError,
    InvalidPictureError,
    Request,
    RequestError,
    TokenEvent,
    join,
)
from mqwen.engine.sampler import sample
from mqwen.engine.sequence import Sequence
from mqwen.engine.text import TextStream, token_bytes

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel, MQWenProcessor

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # batches in a row, after which the engine calls itself ill


@dataclass(frozen=True)
class EngineSettings:
    """max_length: most positions of a sequence, prompt and answer; None is the model's seq_length.

    max_batch_positions bounds the cache: rows of a batch × the longest row. picture_cache_bytes bounds the features
    kept of pictures seen before. model_name: what metrics call the model.
    """

    model_name: str = "model"
    max_length: int | None = None
    max_batch_size: int = 32
    max_batch_positions: int = 65536
    picture_threads: int = 2
    picture_batch: int = 32
    picture_cache_bytes: int = 256 << 20


@dataclass(frozen=True)
class EngineStats:
    """waiting, running: requests now; the rest since the start. Pictures are counted once a batch."""

    waiting: int
    running: int
    finished: int
    aborted: int
    failed: int
    generated_tokens: int
    pictures_encoded: int
    pictures_reused: int
    picture_cache_bytes: int


class Engine:
    """model: in eval mode, on its device; from now on it belongs to the engine's thread."""

    def __init__(
        self, model: "MQWenLMHeadModel", processor: "MQWenProcessor", settings: EngineSettings | None = None
    ) -> None:
        settings = settings or EngineSettings()
        self._model, self._tokenizer, self._settings = model, processor.tokenizer, settings
        self.max_length = settings.max_length or model.config.seq_length
        self._stop_ids = frozenset(self._tokenizer.stop_ids)
        self._token_bytes = token_bytes(processor.tokenizer)
        self._pictures = PictureEncoder(
            model,
            processor,
            threads=settings.picture_threads,
            batch=settings.picture_batch,
            cache_bytes=settings.picture_cache_bytes,
        )
        self._live: dict[str, Sequence] = {}
        self._loading = 0  # admitted, their pictures not decoded yet
        self._waiting: deque[Sequence] = deque()
        self._running = 0
        self._counts: Counter[str] = Counter()
        self._failures = 0  # batches that failed one after the other
        self._closing = False
        self._changed = threading.Condition()  # guards what both sides touch: _loading, _waiting, _closing
        self._observer = Observer(settings.model_name)
        self._observer.follow(waiting=lambda: self.stats().waiting, running=lambda: self.stats().running)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Token events until one with a finish_reason. Closing the iterator, or cancelling its reader, aborts.

        Raises RequestError where the request cannot be served, EngineClosedError after `drain`, EngineFailedError
        where a step failed.
        """
        sequence = self._sequence(request)
        try:
            await self._enqueue([sequence])
            event = None
            while event is None or event.finish_reason is None:
                event = await sequence.next_event()
                yield event
        finally:
            sequence.aborted = True  # nothing to the thread if it has finished the sequence
            del self._live[request.request_id]

    def generate_all(self, requests: Iterable[Request]) -> list[TokenEvent | RequestError]:
        """For jobs: each request's whole answer as one event, or why it was refused, in their order.

        They wait together, so that the same requests always make the same batches. Call it outside of event loops.

        Raises EngineClosedError after `drain`, EngineFailedError where a step failed.
        """
        return asyncio.run(self._generate_all(requests))

    async def _generate_all(self, requests: Iterable[Request]) -> list[TokenEvent | RequestError]:
        taken: list[Sequence | RequestError] = []
        for request in requests:
            try:
                taken.append(self._sequence(request))
            except RequestError as error:
                taken.append(error)
        sequences = [one for one in taken if isinstance(one, Sequence)]
        try:
            await self._enqueue(sequences)
            return [await _whole(one) if isinstance(one, Sequence) else one for one in taken]
        finally:
            for sequence in sequences:
                sequence.aborted = True
                del self._live[sequence.request.request_id]

    def abort(self, request_id: str) -> None:
        """Ends a request, whose iterator then gives a last event with finish_reason "abort". Unknown ids are none."""
        if sequence := self._live.get(request_id):
            sequence.aborted = True

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=self._loading + len(self._waiting),
            running=self._running,
            finished=self._counts["finished"],
            aborted=self._counts["aborted"],
            failed=self._counts["failed"],
            generated_tokens=self._counts["tokens"],
            pictures_encoded=self._pictures.encoded,
            pictures_reused=self._pictures.reused,
            picture_cache_bytes=self._pictures.cache.bytes,
        )

    def health(self) -> bool:
        """False where only a new process helps: the thread has ended, or one batch after the other fails."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    async def drain(self) -> None:
        """Refuses new requests, lets the others end, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        self._pictures.close()

    def _sequence(self, request: Request) -> Sequence:
        """Checks what can be known of a request before any work is done for it."""

        def require(holds: bool, message: str, param: str) -> None:
            if not holds:
                raise RequestError(message, param)

        rows = self._model.config.vocab_size
        wrong = next((token for token in request.input_ids if not 0 <= token < rows), None)
        require(request.request_id not in self._live, f"request {request.request_id!r} is under way", "request_id")
        require(len(request.input_ids) > 0, "the prompt is empty", "input_ids")
        require(wrong is None, f"token {wrong} is not in the vocabulary of {rows}", "input_ids")
        require(request.max_tokens is None or request.max_tokens > 0, "max_tokens must be at least 1", "max_tokens")
        require(request.temperature >= 0, "temperature must not be negative", "temperature")
        require(0 < request.top_p <= 1, "top_p must be above 0 and at most 1", "top_p")
        placeholders = list(request.input_ids).count(self._model.config.image_token_id)
        if placeholders != len(request.pictures):
            message = f"{len(request.pictures)} pictures were given for {placeholders} placeholders in the prompt"
            raise InvalidPictureError(message, "pictures")
        length = len(request.input_ids) + placeholders * (self._model.config.image_positions - 1)
        limit = self.max_length - length if request.max_tokens is None else request.max_tokens
        if limit < 1 or length + limit > self.max_length:
            asked = "" if request.max_tokens is None else f" and {request.max_tokens} tokens to generate are asked for"
            message = f"the prompt has {length} positions{asked}; the context has {self.max_length} for both"
            raise ContextLengthError(message, "input_ids" if length >= self.max_length else "max_tokens")
        sequence = Sequence(request, length, limit, TextStream(self._token_bytes, request.stop))
        self._live[request.request_id] = sequence  # no await since it was looked for
        return sequence

    async def _enqueue(self, sequences: list[Sequence]) -> None:
        """Decodes pictures, then lets the thread have the sequences, all at once. Bad pictures fail their own alone."""
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is draining")
            self._loading += len(sequences)
        ready: list[Sequence] = []
        try:
            loaded = await asyncio.gather(*(self._load(sequence) for sequence in sequences))
            ready = [sequence for sequence, good in zip(sequences, loaded, strict=True) if good]
        finally:
            with self._changed:
                self._loading -= len(sequences)
                self._waiting.extend(ready)
                self._changed.notify()

    async def _load(self, sequence: Sequence) -> bool:
        try:
            sequence.pictures = await self._pictures.load(sequence.request.pictures)
        except InvalidPictureError as error:
            sequence.fail(error)
            return False
        return True

    def _run(self) -> None:
        """The engine's thread."""
        while sequences := self._next_batch():
            try:
                self._observer.batch(sequences)
                self._decode(Batch(self._model, sequences))
                self._failures = 0
            except Exception:
                logger.exception("A batch of %d requests failed", len(sequences))
                self._failures += 1
                for sequence in sequences:
                    if sequence.finish_reason is None:
                        self._counts["failed"] += 1
                        sequence.fail(EngineFailedError("a step of the engine failed; its log has the cause"))
            self._running = 0

    def _next_batch(self) -> list[Sequence]:
        """Waiting requests, oldest first, as many as the bounds allow; none when the engine has drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or (self._closing and not self._loading))
            batch: list[Sequence] = []
            longest = 0
            while self._waiting and len(batch) < self._settings.max_batch_size:
                longest = max(longest, self._waiting[0].positions)
                if batch and longest * (len(batch) + 1) > self._settings.max_batch_positions:
                    break
                batch.append(self._waiting.popleft())
            self._running = len(batch)
            return batch

    @torch.inference_mode()
    def _decode(self, batch: Batch) -> None:
        """A batch from its pictures to the end of its last sequence."""
        self._end_aborted(batch)
        if not batch.keep_running():
            return
        features = self._pictures.encode(picture for sequence in batch.sequences for picture in sequence.pictures)
        logits = batch.prefill(features)
        while True:
            for sequence, token in zip(batch.sequences, sample(logits, batch.sequences), strict=True):
                sequence.add(token, self._stop_ids)
                self._counts["tokens"] += 1
                self._counts["finished"] += sequence.finish_reason is not None
            self._observer.step(batch.sequences)
            self._end_aborted(batch)
            if not batch.keep_running():
                return
            self._running = len(batch.sequences)
            logits = batch.step()

    def _end_aborted(self, batch: Batch) -> None:
        for sequence in batch.sequences:
            if sequence.aborted and sequence.finish_reason is None:
                sequence.end_aborted()
                self._counts["aborted"] += 1
                self._observer.end(sequence)


async def _whole(sequence: Sequence) -> TokenEvent | RequestError:
    """A sequence's events as one, when it has ended."""
    events: list[TokenEvent] = []
    try:
        while not events or events[-1].finish_reason is None:
            events.append(await sequence.next_event())
    except RequestError as error:
        return error
    return join(events)
