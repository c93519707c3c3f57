"""What an engine says of its requests through telemetry."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mqwen.engine.sequence import Sequence
from mqwen.telemetry import serving

if TYPE_CHECKING:
    from mqwen.engine.engine import EngineStats


def follow(model_name: str, stats: "Callable[[], EngineStats]") -> Callable[[], None]:
    """Shows the figures of an engine as they are now, until what this returns is called."""
    ends = [
        serving.NUM_REQUESTS_WAITING.follow(lambda: stats().waiting, model_name=model_name),
        serving.NUM_REQUESTS_RUNNING.follow(lambda: stats().running, model_name=model_name),
        serving.KV_CACHE_USAGE_PERC.follow(lambda: stats().kv_blocks_used / stats().kv_blocks, model_name=model_name),
    ]

    def end() -> None:
        for each in ends:
            each()

    return end


class Observer:
    """model_name: what metrics call the model. stats: of the engine, now. Its methods are the engine's thread's."""

    def __init__(self, model_name: str, stats: "Callable[[], EngineStats]") -> None:
        self._model, self._seen = model_name, stats()
        # For an engine that has ended: nobody asks it for figures any more, and it can be freed.
        self.close = follow(model_name, stats)

    def admitted(self, sequences: list[Sequence]) -> None:
        """Sequences have left the queue for the first time."""
        now = time.perf_counter()
        for sequence in sequences:
            serving.REQUEST_QUEUE_TIME_SECONDS.observe(now - sequence.arrived, model_name=self._model)

    def step(self, sequences: list[Sequence], stats: "EngineStats") -> None:
        """Each of the sequences has got a token."""
        serving.GENERATION_TOKENS.add(len(sequences), model_name=self._model)
        for sequence in sequences:
            if sequence.completion_tokens == 1:
                serving.PROMPT_TOKENS.add(sequence.prompt_tokens, model_name=self._model)
                serving.TIME_TO_FIRST_TOKEN_SECONDS.observe(sequence.token_seconds, model_name=self._model)
            else:
                serving.INTER_TOKEN_LATENCY_SECONDS.observe(sequence.token_seconds, model_name=self._model)
            if sequence.finish_reason is not None:
                self.end(sequence)
        seen, self._seen = self._seen, stats
        encoded, reused = stats.pictures_encoded - seen.pictures_encoded, stats.pictures_reused - seen.pictures_reused
        serving.NUM_PREEMPTIONS.add(stats.preemptions - seen.preemptions, model_name=self._model)
        serving.PREFIX_CACHE_QUERIES.add(stats.prefix_queries - seen.prefix_queries, model_name=self._model)
        serving.PREFIX_CACHE_HITS.add(stats.prefix_hits - seen.prefix_hits, model_name=self._model)
        serving.MM_CACHE_QUERIES.add(encoded + reused, model_name=self._model)
        serving.MM_CACHE_HITS.add(reused, model_name=self._model)

    def end(self, sequence: Sequence) -> None:
        serving.REQUEST_SUCCESS.add(model_name=self._model, finished_reason=str(sequence.finish_reason))
