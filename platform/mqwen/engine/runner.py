"""The model's forward over one step: decoding sequences and pieces of prompts together, against the paged cache.

What a step needs lies on the device already: each running sequence has a row in tables of ids, blocks and rotary
factors. The host sends row and position of each token, and waits for nothing; a token sampled by one step is read from
the table by the next.

Shapes: T tokens of a step, S sequences that sample, V vocabulary.
"""

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.adapters import Adapters
from mqwen.engine.device import to_device
from mqwen.engine.paged import PagedCache, plan_step
from mqwen.engine.rotary import RotaryTable
from mqwen.engine.scheduler import Step, Work

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel


class Runner:
    """rows: most sequences at once. max_length: of each. blocks: of the cache, the first being nobody's."""

    def __init__(
        self, model: "MQWenLMHeadModel", adapters: Adapters, *, rows: int, max_length: int, blocks: int, size: int
    ) -> None:
        config = model.config
        self._model, self._adapters, self._device = model, adapters, model.device
        heads, channels = config.num_attention_heads, config.kv_channels
        like = model.transformer.wte.weight
        self._cache = PagedCache(config.num_hidden_layers, blocks, size, heads, channels, like)
        self.rotary = RotaryTable(config, max_length, self._device)
        self.ids = self._table(rows, max_length + 1)
        self._blocks = self._table(rows, -(-max_length // size))
        self._rotary_places = self._table(rows)
        self._adapter_numbers = self._table(rows)

    def _table(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def prepare(self, step: Step) -> None:
        """Writes what is new in a step into the tables."""
        blocks = list(step.grown)
        if step.admitted:
            ids, settings = [], []
            for sequence in step.admitted:
                row = sequence.row
                assert row is not None
                known = np.arange(sequence.known)
                ids.append(np.stack((np.full(len(known), row), known, sequence.ids[: sequence.known])))
                adapter = self._adapters.numbers.get(sequence.request.adapter or "", 0)
                settings.append((row, self.rotary.place(sequence.alpha), adapter))
                blocks += [(row, place, block) for place, block in enumerate(sequence.blocks)]
            rows, positions, tokens = self._send(np.concatenate(ids, axis=1))
            self.ids[rows, positions] = tokens
            rows, places, adapters = self._send(np.array(settings).T)
            self._rotary_places[rows], self._adapter_numbers[rows] = places, adapters
        if blocks:
            rows, places, numbers = self._send(np.array(blocks).T)
            self._blocks[rows, places] = numbers

    def forward(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (S, V) after the works that sample, and (S,) rows and positions of the tokens that follow."""
        rows = np.array([work.sequence.row for work in works])
        starts = np.array([work.start for work in works])
        counts = np.array([work.stop for work in works]) - starts
        firsts = np.cumsum(counts) - counts
        tokens = np.arange(counts.sum())
        sent = self._send(np.stack((np.repeat(rows, counts), np.repeat(starts - firsts, counts) + tokens)))
        token_rows, positions = sent
        rotary = self.rotary.look_up(self._rotary_places[token_rows], positions)
        plan = plan_step(self._cache, rotary, self._blocks, token_rows, positions, starts, counts)
        hidden = self._model.transformer.wte(self.ids[token_rows, positions])
        self._put_pictures(hidden, works, firsts)
        hidden = hidden.unsqueeze(0)
        adapted = any(work.sequence.request.adapter for work in works)
        with self._adapters.for_rows(self._adapter_numbers[token_rows] if adapted else None):
            for block in self._model.transformer.h:
                hidden = block(hidden, plan)
        hidden = hidden[0]
        samples = np.array([work.samples for work in works])
        if not samples.all() or len(works) < len(tokens):
            last = self._send((firsts + counts - 1)[samples])
            hidden, token_rows, positions = hidden[last], token_rows[last], positions[last]
        with self._adapters.for_rows(self._adapter_numbers[token_rows] if adapted else None):
            logits = self._model.lm_head(self._model.transformer.ln_f(hidden))
        logits[:, self._model.config.image_token_id] = -torch.inf  # it would ask for a picture in the next step
        return logits, token_rows, positions + 1

    def _put_pictures(self, hidden: Tensor, works: Many[Work], firsts: NDArray[np.int64]) -> None:
        """Features in the places of the pictures' positions. hidden: (T, E), changed in place."""
        width = self._model.config.image_positions
        for work, first in zip(works, firsts.tolist(), strict=True):
            for picture, at in work.sequence.pictures_between(work.start, work.stop, width):
                start, stop = max(at, work.start), min(at + width, work.stop)
                target = first - work.start
                hidden[target + start : target + stop] = picture.take()[start - at : stop - at]

    def _send(self, values: NDArray[Any]) -> Tensor:
        return to_device(values, self._device)
