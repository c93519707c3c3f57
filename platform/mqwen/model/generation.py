"""Stop words of more than one token, for transformers' generate. Single tokens need only `eos_token_id=[...]`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LogitsProcessor

FORCED = 2.0**15  # the score by which Qwen v1 makes the end certain


class StopWordsLogitsProcessor(LogitsProcessor):
    """Force the end token on the step after a stop word; the stop word itself stays in the output.

    Args:
        stop_words: token ids of each stop word.
        eos_token_id: the token to force.
        prompt_length: ids of the prompt; a stop word counts only where it was generated. 0 looks at the prompt too.
    """

    def __init__(self, stop_words: Sequence[Sequence[int]], eos_token_id: int, prompt_length: int = 0) -> None:
        if not all(stop_words):
            raise ValueError("a stop word needs at least one token")
        self.stop_words = [list(word) for word in stop_words]
        self.eos_token_id = eos_token_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) for the ids (B, T) so far, with the end forced in rows that end in a stop word."""
        generated = input_ids[:, self.prompt_length :]
        for word in self.stop_words:
            if generated.shape[1] >= len(word):
                ended = (generated[:, -len(word) :] == generated.new_tensor(word)).all(1)
                scores = scores.clone()
                scores[ended, self.eos_token_id] = FORCED
        return scores
