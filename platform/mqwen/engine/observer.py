"""What an engine says of its requests through telemetry."""

import time
from collections.abc import Callable

from mqwen.engine.sequence import Sequence
from mqwen.telemetry import serving


class Observer:
    """model_name: what metrics call the model. Its methods are the engine's thread's."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name

    def follow(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """How many requests wait and run is asked for from now on."""
        serving.NUM_REQUESTS_WAITING.follow(waiting, model_name=self._model)
        serving.NUM_REQUESTS_RUNNING.follow(running, model_name=self._model)

    def batch(self, sequences: list[Sequence]) -> None:
        """Sequences have left the queue."""
        now = time.perf_counter()
        for sequence in sequences:
            serving.REQUEST_QUEUE_TIME_SECONDS.observe(now - sequence.arrived, model_name=self._model)

    def step(self, sequences: list[Sequence]) -> None:
        """Each sequence has got a token."""
        serving.GENERATION_TOKENS.add(len(sequences), model_name=self._model)
        for sequence in sequences:
            if sequence.completion_tokens == 1:
                serving.PROMPT_TOKENS.add(sequence.prompt_tokens, model_name=self._model)
                serving.TIME_TO_FIRST_TOKEN_SECONDS.observe(sequence.token_seconds, model_name=self._model)
            else:
                serving.INTER_TOKEN_LATENCY_SECONDS.observe(sequence.token_seconds, model_name=self._model)
            if sequence.finish_reason is not None:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        serving.REQUEST_SUCCESS.add(model_name=self._model, finished_reason=str(sequence.finish_reason))
