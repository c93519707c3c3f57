"""Next tokens from logits. Shapes: B rows, V vocabulary."""

from collections.abc import Sequence
from random import Random
from typing import Protocol

import torch
from torch import Tensor


class Sampling(Protocol):
    """What the sampler needs to know of a row."""

    temperature: float
    top_p: float
    random: Random  # the row's own, so that its draws do not depend on its neighbours or on the device


def sample(logits: Tensor, rows: Sequence[Sampling]) -> list[int]:
    """One token a row. logits: (B, V), any float dtype. Temperature 0 takes the largest."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        for i, token in zip(drawn, _draw(logits[drawn].float(), [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def _draw(logits: Tensor, rows: Sequence[Sampling]) -> list[int]:
    """Temperature, then the nucleus (Holtzman et al. 2020, arXiv:1904.09751), then the inverse of the distribution."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    probs = torch.softmax(logits / column([row.temperature for row in rows]), dim=-1)
    probs, order = probs.sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs  # the mass ahead of each token: 0 for the first, so one is always kept
    kept = before < column([row.top_p for row in rows])
    mass = (probs * kept).cumsum(dim=-1)
    point = column([row.random.random() for row in rows]) * mass[:, -1:]
    place = torch.searchsorted(mass, point, right=True).minimum(kept.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1).tolist()
