"""Rotary angles and logn factors of all positions, for each α that a prompt can have."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqwen.model.rotary import logn_factors, ntk_alpha, rotary_tables

if TYPE_CHECKING:
    from mqwen.model import MQWenConfig


class RotaryTable:
    """For sequences of up to max_length positions.

    angles: cosines, then sines, (max_length of each α, channels), float32. logn: (max_length,), or None.
    """

    def __init__(self, config: "MQWenConfig", max_length: int, device: torch.device) -> None:
        seq_length = config.seq_length if config.use_dynamic_ntk else max_length
        lengths = torch.arange(1, max_length + 1)
        of_lengths = ntk_alpha(lengths, seq_length)
        self._alphas = of_lengths.tolist()
        alphas = of_lengths.unique()
        positions = torch.arange(max_length).unsqueeze(0)
        tables = [
            torch.cat(rotary_tables(positions, alpha.view(1, 1), config.rotary_dim, config.rotary_emb_base), dim=-1)
            for alpha in alphas
        ]
        self.angles = torch.cat(tables, dim=1)[0].to(device)
        self._places = {alpha: place * max_length for place, alpha in enumerate(alphas.tolist())}
        extends = config.use_logn_attn and max_length > config.seq_length
        self.logn = logn_factors(positions[0], config.seq_length).to(device) if extends else None

    def alpha(self, prompt_tokens: int) -> float:
        """Of a sequence that begins with a prompt so long."""
        return self._alphas[prompt_tokens - 1]

    def place(self, alpha: float) -> int:
        """What is to be added to a position of a sequence with this α, to find it in the table."""
        return self._places[alpha]

    def look_up(self, places: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin, (1, T, channels / 2), and logn (1, T) or None. places, positions: (T,)."""
        cos, sin = self.angles[places + positions].unsqueeze(0).chunk(2, dim=-1)
        return cos, sin, None if self.logn is None else self.logn[positions].unsqueeze(0)
