"""The engine: requests in on any event loop, one thread that owns the model, token events out.

The way of a request: `generate` checks it and has its pictures decoded in threads; it waits; the scheduler gives it a
place and blocks of the cache; steps work on its prompt, piece by piece, and then on a token each, beside all others
that run. What ends leaves at once, and the next that waits takes its place.
"""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mqwen.engine.adapters import Adapters
from mqwen.engine.blocks import BlockPool
from mqwen.engine.float8 import to_float8
from mqwen.engine.grammar import allowed_tokens
from mqwen.engine.intake import Intake
from mqwen.engine.observer import Observer
from mqwen.engine.outbox import EVENT_SECONDS, Outbox, tell
from mqwen.engine.paged import count_blocks
from mqwen.engine.pictures import PictureEncoder
from mqwen.engine.request import (
    EngineClosedError,
    EngineFailedError,
    Request,
    RequestError,
    TokenEvent,
    join,
)
from mqwen.engine.runner import Runner
from mqwen.engine.sampler import Sampled, Sampler
from mqwen.engine.scheduler import Scheduler, Step, Work
from mqwen.engine.sequence import Sequence

if TYPE_CHECKING:
    from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor

logger = logging.getLogger(__name__)

REACH = 4  # prompts of a step may see this many times what the longest sequence, or a whole step, has of positions
MAX_FAILURES = 3  # steps in a row, after which the engine calls itself ill


@dataclass(frozen=True)
class EngineSettings:
    """max_length: most positions of a sequence, prompt and answer; None is the model's seq_length.

    max_batch_size: most sequences at once. max_step_positions: most positions that one step works on; longer prompts
    go in by pieces. kv_cache_bytes: of keys and values; None takes what `paged.count_blocks` finds right.
    picture_cache_bytes bounds the features kept of pictures seen before. adapters: LoRA folders by the names that
    requests give. model_name: what metrics call the model. overlap: schedule a step while the one before it runs; None
    does so on a GPU. gpu_share: what this engine may have of its GPU's memory. float8: the blocks' weights in 8 bits.
    """

    model_name: str = "model"
    max_length: int | None = None
    max_batch_size: int = 64
    max_step_positions: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    picture_threads: int = 2
    picture_batch: int = 32
    picture_cache_bytes: int = 256 << 20
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    overlap: bool | None = None
    gpu_share: float = 1.0
    float8: bool = False


@dataclass(frozen=True)
class EngineStats:
    """waiting, running: requests now. kv_blocks, kv_blocks_used: of the cache, now. picture_cache_bytes: now.

    The rest since the start: prefix_queries and prefix_hits in positions of prompts, looked for and found in the cache;
    pictures encoded, and found in theirs, counted once a step.
    """

    waiting: int
    running: int
    finished: int
    aborted: int
    failed: int
    generated_tokens: int
    preemptions: int
    kv_blocks: int
    kv_blocks_used: int
    prefix_queries: int
    prefix_hits: int
    pictures_encoded: int
    pictures_reused: int
    picture_cache_bytes: int


class Engine:
    """model: in eval mode, on its device; from now on it belongs to the engine's thread."""

    def __init__(
        self, model: "MQWenLMHeadModel", processor: "MQWenProcessor", settings: EngineSettings | None = None
    ) -> None:
        settings = settings or EngineSettings()
        adapters = Adapters(model, settings.adapters)
        if settings.float8:  # after adapters were read, whose dtype is the weights'
            to_float8(model)
        self._weights = list(model.parameters())
        max_length = settings.max_length or model.config.seq_length
        blocks = count_blocks(
            model,
            settings.block_size,
            max_length,
            settings.max_batch_size,
            settings.kv_cache_bytes,
            settings.gpu_share,
        )
        self.max_length = min(max_length, blocks * settings.block_size)
        self._pictures = PictureEncoder(
            model,
            processor,
            adapters,
            threads=settings.picture_threads,
            batch=settings.picture_batch,
            cache_bytes=settings.picture_cache_bytes,
        )
        self._pool = BlockPool(blocks + 1, settings.block_size)
        self.picture_positions = self._width = model.config.image_positions
        self._scheduler = Scheduler(
            self._pool,
            positions=settings.max_step_positions,
            reach=REACH * max(self.max_length, settings.max_step_positions),
            rows=settings.max_batch_size,
            width=self._width,
        )
        kind = runner_of(model.config, model.device, model.dtype)
        slow = model.device.type == "cuda" and kind is Runner
        level = logging.WARNING if slow else logging.INFO  # a card without its kernels is worth a look
        logger.log(level, "%s: %s on %s by %s", settings.model_name, model.dtype, model.device, kind.__name__)
        self._runner = kind(
            model,
            adapters,
            rows=settings.max_batch_size,
            max_length=self.max_length,
            blocks=blocks + 1,
            size=settings.block_size,
        )
        self._sampler = Sampler(settings.max_batch_size, model.config.vocab_size, self._runner.ids)
        self._intake = Intake(
            model.config, processor.tokenizer, self._pictures, adapters, self._runner.rotary, self.max_length
        )
        self._stop_ids = frozenset(processor.tokenizer.stop_ids)
        overlap = model.device.type == "cuda" if settings.overlap is None else settings.overlap
        self._lag = 1 if overlap else 0
        self._live: dict[str, Sequence] = {}
        self._loading = 0  # admitted, their pictures not decoded yet
        self._arrived: deque[Sequence] = deque()
        self._aborted: deque[Sequence] = deque()
        self._counts: Counter[str] = Counter()
        self._failures = 0  # steps that failed one after the other
        self._closing = False
        self._changed = threading.Condition()  # guards what both sides touch: _loading, _arrived, _aborted, _closing
        self._observer = Observer(settings.model_name, self.stats)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Token events until one with a finish_reason. Closing the iterator, or cancelling its reader, aborts.

        Raises RequestError where the request cannot be served, EngineClosedError after `drain`, EngineFailedError
        where a step failed.
        """
        sequence = self._accept(request, streams=True)
        try:
            await self._enqueue([sequence])
            event = None
            while event is None or event.finish_reason is None:
                event = await sequence.outbox.take()
                yield event
        finally:
            self._leave(sequence)

    async def complete(self, request: Request) -> TokenEvent:
        """The whole answer as one event, at less cost than one by one. Raises what `generate` does."""
        sequence = self._accept(request, streams=False)
        try:
            await self._enqueue([sequence])
            return await _whole(sequence)
        finally:
            self._leave(sequence)

    def generate_all(self, requests: Iterable[Request]) -> list[TokenEvent | RequestError]:
        """For jobs: each request's whole answer as one event, or why it was refused, in their order.

        They wait together, so that the same requests always make the same batches. Call it outside of event loops.

        Raises EngineClosedError after `drain`, EngineFailedError where a step failed.
        """
        return asyncio.run(self._generate_all(requests))

    async def _generate_all(self, requests: Iterable[Request]) -> list[TokenEvent | RequestError]:
        taken: list[Sequence | RequestError] = []
        sequences: list[Sequence] = []
        answers: list[TokenEvent | RequestError] = []
        try:
            for request in requests:  # their iterator may raise too
                try:
                    sequences.append(self._accept(request, streams=False))
                    taken.append(sequences[-1])
                except RequestError as error:
                    taken.append(error)
            await self._enqueue(sequences)
            for one in taken:
                try:
                    answers.append(await _whole(one) if isinstance(one, Sequence) else one)
                except RequestError as error:
                    answers.append(error)
        finally:
            for sequence in sequences:
                self._leave(sequence)
        return answers

    def abort(self, request_id: str) -> None:
        """Ends a request, whose iterator then gives a last event with finish_reason "abort". Unknown ids are none."""
        if sequence := self._live.get(request_id):
            self._abort(sequence)

    def stats(self) -> EngineStats:
        scheduler, pictures = self._scheduler, self._pictures
        return EngineStats(
            waiting=self._loading + len(self._arrived) + len(scheduler.waiting),
            running=len(scheduler.running),
            finished=self._counts["finished"],
            aborted=self._counts["aborted"],
            failed=self._counts["failed"],
            generated_tokens=self._counts["tokens"],
            preemptions=scheduler.preemptions,
            kv_blocks=self._pool.count,
            kv_blocks_used=self._pool.count - self._pool.free,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            pictures_encoded=pictures.encoded,
            pictures_reused=pictures.reused,
            picture_cache_bytes=pictures.cache.bytes,
        )

    def health(self) -> bool:
        """False where only a new process helps: the thread has ended, or one step after the other fails."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    async def drain(self) -> None:
        """Refuses new requests, lets the others end, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        self._pictures.close()
        self._observer.close()

    def _accept(self, request: Request, *, streams: bool) -> Sequence:
        if request.request_id in self._live:
            raise RequestError(f"request {request.request_id!r} is under way", "request_id")
        sequence = self._intake.check(request, Outbox(streams))
        self._live[request.request_id] = sequence  # no await since it was looked for
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        """Its reader needs no more of it."""
        del self._live[sequence.request.request_id]
        self._abort(sequence)

    def _abort(self, sequence: Sequence) -> None:
        with self._changed:
            sequence.aborted = True
            self._aborted.append(sequence)
            self._changed.notify()

    async def _enqueue(self, sequences: list[Sequence]) -> None:
        """Prepares sequences, then lets the thread have them, all at once. What is wrong with one fails it alone."""
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is draining, or has ended")
            self._loading += len(sequences)
        ready: list[Sequence] = []
        try:
            loading = [sequence for sequence in sequences if self._intake.loads(sequence)]
            loaded = await asyncio.gather(*(map(self._intake.load, loading))) if loading else []
            failed = {id(sequence) for sequence, good in zip(loading, loaded, strict=True) if not good}
            ready = [sequence for sequence in sequences if id(sequence) not in failed]
        finally:
            with self._changed:
                self._loading -= len(sequences)
                self._arrived.extend(ready)
                self._changed.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        """The engine's thread. What ends it before its time fails every request: no reader waits for a dead thread."""
        try:
            self._work()
        except BaseException:
            logger.exception("The engine's thread ends")
            with self._changed:
                self._closing = True  # who comes later is refused
            for sequence in list(self._live.values()):
                self._counts["failed"] += 1
                sequence.outbox.fail(EngineFailedError("the engine has ended; its log has the cause"))

    def _work(self) -> None:
        """Step after step, until all is drained. `under_way`: steps whose tokens are not known here yet; see
        `overlap`."""
        under_way: deque[Launched] = deque()
        while self._take_changes(busy=bool(under_way)):
            step = self._scheduler.schedule()
            launched = None
            if step.works:
                try:
                    launched = self._launch(step)
                    under_way.append(launched)
                except Exception:
                    self._fail(step.works)
            # A grammar must know a token to allow the next; a sequence that was preempted must know all of its own
            # before it is admitted again, which the step after a failed one may do.
            waits = launched is None or any(work.sequence.grammar for work in step.works)
            lag = 0 if waits else self._lag
            while len(under_way) > lag:
                oldest = under_way.popleft()
                try:
                    self._finish(oldest)
                except Exception:
                    self._fail(oldest.works)

    def _take_changes(self, busy: bool) -> bool:
        """Requests that came or left since; waits for some where there is no work. False when all is drained."""

        def closed() -> bool:
            return self._closing and not self._loading and not self._arrived

        busy = busy or bool(self._scheduler.running) or len(self._scheduler.waiting) > 0
        with self._changed:
            if not busy:
                self._changed.wait_for(lambda: self._arrived or self._aborted or closed())
            ends = not busy and closed()
            arrived, aborted = list(self._arrived), list(self._aborted)
            self._arrived.clear()
            self._aborted.clear()
        if arrived:
            version = weights_version(self._weights)
            self._pictures.version = version
            for sequence in arrived:
                sequence.root = f"{version} {sequence.request.adapter!r} {sequence.alpha}".encode()
                sequence.live = True
                self._scheduler.waiting.push(sequence)
        for sequence in arrived + aborted:
            if sequence.aborted and sequence.live:
                self._end_aborted(sequence)
        return not ends

    def _launch(self, step: Step) -> "Launched":
        """Starts a step; on a GPU it is still running afterwards."""
        self._observer.admitted([sequence for sequence in step.admitted if not sequence.completion_tokens])
        self._runner.prepare(step)
        if step.admitted:
            self._sampler.admit(
                [sequence.row for sequence in step.admitted if sequence.row is not None],
                [sequence.request for sequence in step.admitted],
                [sequence.seed for sequence in step.admitted],
                [sequence.ids[sequence.prompt_tokens : sequence.known] for sequence in step.admitted],
            )
        missing = [
            (picture, work.sequence.request.adapter)
            for work in step.works
            for picture, _ in work.sequence.pictures_between(work.start, work.stop, self._width)
            if picture.features is None
        ]
        if missing:
            self._pictures.encode(missing)
        logits, rows, positions = self._runner.forward(step.works)
        sequences = [work.sequence for work in step.works if work.samples]
        requests = [sequence.request for sequence in sequences]
        logprobs = max((one.logprobs for one in requests if one.logprobs is not None), default=None)
        allowed = allowed_tokens([sequence.grammar for sequence in sequences], logits.shape[1])
        sampled = self._sampler.sample(logits, rows, positions, requests, logprobs, allowed)
        return Launched(step.works, sampled)

    def _finish(self, launched: "Launched") -> None:
        """Gives out the tokens of a step; who had its last leaves."""
        tokens = launched.tokens()
        sampled: list[Sequence] = []
        told: list[Outbox] = []
        pause = EVENT_SECONDS * len(self._scheduler.running)
        place = 0  # among the sequences that sample
        for work in launched.works:
            sequence = work.sequence
            if sequence.live and work.samples and not self._breaks_grammar(sequence, tokens[place]):
                wants = sequence.request.logprobs
                logprob = None if wants is None else launched.sampled.logprob(place, wants)
                if sequence.add(tokens[place], self._stop_ids, logprob, pause):
                    told.append(sequence.outbox)
                sampled.append(sequence)
            place += work.samples
            if sequence.row is not None:  # else it has ended or was preempted, and its blocks may be another's
                self._scheduler.publish(work)
                sequence.drop_pictures(work.start, work.stop, self._width)
        self._failures = 0
        self._counts["tokens"] += len(sampled)
        self._observer.step(sampled, self.stats())
        ended = [sequence for sequence in sampled if sequence.finish_reason is not None]
        for sequence in ended:
            self._counts["finished"] += 1
            self._remove(sequence)
        left = tell(told)
        for sequence in sampled:
            if sequence.outbox in left and sequence.live:
                self._end_aborted(sequence)

    def _breaks_grammar(self, sequence: Sequence, token: int) -> bool:
        """Takes the token into the sequence's grammar; one that can be followed no more fails its request alone."""
        if sequence.grammar is None or (failure := sequence.grammar.take(token)) is None:
            return False
        self._remove(sequence)
        self._counts["failed"] += 1
        sequence.outbox.fail(failure)
        return True

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.live = False

    def _end_aborted(self, sequence: Sequence) -> None:
        self._remove(sequence)
        self._counts["aborted"] += 1
        sequence.end_aborted()
        self._observer.end(sequence)
        tell([sequence.outbox])

    def _fail(self, works: list[Work]) -> None:
        """A step failed: its requests end, all others go on."""
        logger.exception("A step with %d requests failed", len(works))
        self._failures += 1
        for sequence in (work.sequence for work in works):
            if sequence.live:
                self._remove(sequence)
                self._counts["failed"] += 1
                sequence.outbox.fail(EngineFailedError("a step of the engine failed; its log has the cause"))


def runner_of(config: "MQWenConfig", device: torch.device, dtype: torch.dtype) -> type[Runner]:
    """Kernels of our own where they can run: in bfloat16 on a card, for heads that are rotated whole."""
    channels = config.kv_channels
    whole = config.rotary_dim == channels and channels.bit_count() == 1
    if device.type == "cuda" and dtype == torch.bfloat16 and whole:
        from mqwen.engine.cuda.runner import CudaRunner  # brings Triton, which only such a machine has

        return CudaRunner
    return Runner


class Launched:
    """A step under way. sampled: on its way to the host."""

    def __init__(self, works: list[Work], sampled: Sampled) -> None:
        self.works, self.sampled = works, sampled.to_host()
        self._done = torch.cuda.Event() if sampled.tokens.is_cuda else None
        if self._done is not None:
            self._done.record()

    def tokens(self) -> list[int]:
        """Waits for them."""
        if self._done is not None:
            self._done.synchronize()
        return self.sampled.tokens.tolist()


def weights_version(weights: Iterable[torch.Tensor]) -> str:
    """Another one after each change of a weight in place: keys and values, and features, of the old ones are none."""
    return str(sum(0 if one.is_inference() else one._version for one in weights))


async def _whole(sequence: Sequence) -> TokenEvent:
    """A sequence's events as one, when it has ended."""
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events.append(await sequence.outbox.take())
    return join(events)
