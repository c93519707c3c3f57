"""MQWenCache: what a batch of running sequences keeps between calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mqwen.model.errors import CacheError
from mqwen.model.rotary import ntk_alpha
from mqwen.model.rows import Expanded, Layout


class MQWenCache(Cache):
    """Keys and values of each layer, and of each row its length, its mask and its rotary factor.

    α of the dynamic NTK is fixed at a sequence's prefill and kept here, because cached keys are rotated by it already;
    so sequences that run side by side, or a training step between two of their steps, never change one another.

    Args:
        prompt_lengths: (B,), expanded positions of each row's whole prompt. Needed only where the prompt is fed in
            chunks and exceeds seq_length: the first chunk alone would fix an α that is too small.

    Attributes:
        layers: per layer `keys` and `values`, (B, heads, K, head channels), keys after rotation.
        alpha: (B,), float32, or None while every row's factor is 1.
        lengths: (B,), int64: tokens and picture positions of each row so far, padding not counted.
        mask: (B, K), int64, 1 where a key is a token; or None where all are.
        key_length: K, the places of each row so far, padding counted.
        token_count: ids of each row so far, padding counted, a picture as one: what `generate` counts in.
    """

    def __init__(self, prompt_lengths: Tensor | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.prompt_lengths = prompt_lengths
        self.alpha: Tensor | None = None
        self.lengths: Tensor | None = None
        self.mask: Tensor | None = None
        self.key_length = 0
        self.token_count = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Ids fed so far, a picture as one id: the unit in which transformers' generate slices ids and masks."""
        return self.token_count

    def mask_of_new(self, attention_mask: Tensor | None, tokens: int) -> Tensor | None:
        """The part of a mask that covers the `tokens` new ids; what was fed before is remembered here.

        `attention_mask` may cover the new ids only, all ids so far (as generate grows it), or all places so far.
        """
        if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] <= tokens:
            return attention_mask
        if attention_mask.shape[1] == self.token_count + tokens:
            return attention_mask[:, self.token_count :]
        return attention_mask[:, self.key_length :]

    def append(self, expanded: Expanded, positions: Tensor) -> None:
        """Take the rows of one call into lengths and mask. Keys and values follow layer by layer.

        Args:
            positions: (B, L) or (1, L), of the new places in their sequences.

        Raises:
            CacheError: another number of rows than before.
        """
        rows, length = expanded.ids.shape
        for known in (self.lengths, self.prompt_lengths):
            if known is not None and len(known) != rows:
                raise CacheError(f"the cache is for {len(known)} rows, the call has {rows}; start another cache")
        new = None if expanded.layout is Layout.FULL else expanded.segments
        if new is None:
            self.lengths = (positions[:, -1] + 1).expand(rows)
        else:
            before = 0 if self.lengths is None else self.lengths
            self.lengths = before + (new > 0).sum(1)
        if new is not None or self.mask is not None:
            ones = expanded.ids.new_ones
            old = ones(rows, self.key_length) if self.mask is None else self.mask
            self.mask = torch.cat((old, ones(rows, length) if new is None else (new > 0).long()), dim=1)
        self.key_length += length
        self.token_count += expanded.token_count

    def fix_alpha(self, seq_length: int) -> None:
        """Settle each row's rotary factor at its prefill, from its length or the promised prompt_lengths."""
        assert self.lengths is not None
        lengths = self.lengths if self.prompt_lengths is None else self.prompt_lengths.to(self.lengths.device)
        if self.prompt_lengths is not None or self.key_length > seq_length:
            self.alpha = ntk_alpha(lengths, seq_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64), in that order."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `abs(tokens_to_remove)` places of every row; they must have been ids, not pictures."""
        count = abs(tokens_to_remove)
        if count == 0 or self.lengths is None:
            return
        super().crop(-count)
        removed = count if self.mask is None else self.mask[:, -count:].sum(1)
        self.lengths = self.lengths - removed
        self.mask = None if self.mask is None else self.mask[:, :-count]
        self.key_length -= count
        self.token_count -= count

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("alpha", "lengths", "mask", "prompt_lengths"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
