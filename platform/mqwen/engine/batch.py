"""Sequences that the model works on together: one prefill, then a token each a step.

Shapes: B rows (one a sequence), P positions of a picture, E hidden size, V vocabulary.
"""

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqwen.engine.sequence import Sequence

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel


class Batch:
    """The rows that are still running, with their cache."""

    def __init__(self, model: "MQWenLMHeadModel", sequences: Rows[Sequence]) -> None:
        from mqwen.model.cache import MQWenCache

        self._model = model
        self._cache = MQWenCache()
        self.sequences = list(sequences)

    def prefill(self, features: dict[str, Tensor]) -> Tensor:
        """Logits after each prompt, (B, V). features: (P, E) by picture key.

        Prompts are padded on the left, so that every row's last position is its newest; the cache keeps the mask.
        """
        prompts = [list(sequence.request.input_ids) for sequence in self.sequences]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        images = [features[picture.key] for sequence in self.sequences for picture in sequence.pictures]
        return self._forward(ids, attention_mask=mask, images=torch.stack(images) if images else None)

    def keep_running(self) -> bool:
        """Lets rows go whose sequences have finished; whether any is left."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence.finish_reason is None]
        if rows and len(rows) < len(self.sequences):
            self._cache.batch_select_indices(torch.tensor(rows, device=self._model.device))
        self.sequences = [self.sequences[row] for row in rows]
        return bool(rows)

    def step(self) -> Tensor:
        """Logits after each sequence's newest token, (B, V)."""
        return self._forward(torch.tensor([[sequence.newest] for sequence in self.sequences]))

    def _forward(self, ids: Tensor, attention_mask: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        output = self._model(
            ids,  # on the CPU, where the model plans the rows; it copies them to its device without a wait
            attention_mask=attention_mask,
            images=images,
            past_key_values=self._cache,
            padding_side="left",
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        logits[:, self._model.config.image_token_id] = -torch.inf  # it would ask for a picture in the next step
        return logits
