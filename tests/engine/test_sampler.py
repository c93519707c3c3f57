"""The sampler against transformers' processors, and its independence of neighbours."""

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from mqwen.engine.sampler import sample


@dataclass
class Row:
    temperature: float = 1.0
    top_p: float = 1.0
    random: Random = field(default_factory=lambda: Random(0))


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [Row(temperature=0.0)] * 8) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.3), (0.5, 0.95)])
def test_distribution_is_that_of_transformers(temperature: float, top_p: float) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0]
    draws = 20_000
    drawn = sample(logits.expand(draws, -1), [Row(temperature, top_p, Random(7))] * draws)
    counts = torch.bincount(torch.tensor(drawn), minlength=12).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        probs = expected[kept].double()
        assert chisquare(counts[kept].numpy(), (probs / probs.sum() * draws).numpy()).pvalue > 1e-3


def test_a_seed_draws_the_same_alone_and_in_company() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    alone = [sample(logits[i : i + 1], [Row(random=Random(i))])[0] for i in range(3)]
    assert sample(logits, [Row(random=Random(i)) for i in range(3)]) == alone


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sample(logits, [Row(top_p=1e-9)]) == [1]


def test_a_draw_at_the_very_end_stays_inside_the_nucleus() -> None:
    class End(Random):
        def random(self) -> float:
            return 1.0 - 2**-53  # 1.0 in float32

    logits = torch.tensor([[5.0, 5.0, -5.0, -5.0]])
    assert sample(logits, [Row(top_p=0.9, random=End())])[0] in (0, 1)
