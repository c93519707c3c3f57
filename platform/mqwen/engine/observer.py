"""What an engine says of its requests through telemetry."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mqwen.engine.sequence import Sequence
from mqwen.telemetry import serving

if TYPE_CHECKING:
    from mqwen.engine.engine import EngineStats


# What the engine counts itself.
TOTALS: "dict[serving.Counter, Callable[[EngineStats], int]]" = {
    serving.NUM_PREEMPTIONS: lambda stats: stats.preemptions,
    serving.PREFIX_CACHE_QUERIES: lambda stats: stats.prefix_queries,
    serving.PREFIX_CACHE_HITS: lambda stats: stats.prefix_hits,
    serving.MM_CACHE_QUERIES: lambda stats: stats.pictures_encoded + stats.pictures_reused,
    serving.MM_CACHE_HITS: lambda stats: stats.pictures_reused,
}


class Observer:
    """model_name: what metrics call the model. Its methods are the engine's thread's."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._seen = dict.fromkeys(TOTALS, 0)

    def follow(self, stats: "Callable[[], EngineStats]") -> None:
        """What is true of the engine at a time is asked for from now on."""
        serving.NUM_REQUESTS_WAITING.follow(lambda: stats().waiting, model_name=self._model)
        serving.NUM_REQUESTS_RUNNING.follow(lambda: stats().running, model_name=self._model)
        serving.KV_CACHE_USAGE_PERC.follow(lambda: stats().kv_blocks_used / stats().kv_blocks, model_name=self._model)

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
        for counter, value in TOTALS.items():
            counter.add(value(stats) - self._seen[counter], model_name=self._model)
            self._seen[counter] = value(stats)

    def end(self, sequence: Sequence) -> None:
        serving.REQUEST_SUCCESS.add(model_name=self._model, finished_reason=str(sequence.finish_reason))
