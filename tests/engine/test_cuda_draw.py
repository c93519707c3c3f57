"""Draws by the kernel against transformers' processors; on a card, or, with fewer draws, by Triton's interpreter."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("triton")

from mqwen.engine.cuda.draw import draw
from mqwen.engine.request import Request
from mqwen.engine.sampler import SETTINGS
from tests.engine.test_sampler import random_logits, warped

CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"


def drawn(logits: torch.Tensor, options: list[dict[str, Any]], seeds: list[int], block: int = 16) -> list[int]:
    """Row i of the logits by options i and seed i; the settings lie in reverse."""
    requests = [Request("", [0], **one) for one in options]
    settings = torch.tensor([[float(getattr(one, name)) for name in SETTINGS] for one in requests])
    rows = torch.arange(len(logits)).flip(0)
    places = settings.flip(0), torch.tensor(seeds).flip(0), rows, torch.full((len(logits),), 9)
    ids, told = torch.zeros(len(logits), 10, dtype=torch.int64, device=DEVICE), torch.zeros(len(logits) + 1).long()
    told = told.pin_memory() if CARD else told
    tokens = draw(logits.to(DEVICE), *(one.to(DEVICE) for one in places), ids, told, block=block).tolist()
    assert ids[:, 9].flip(0).tolist() == told[:-1].tolist() == tokens
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.3},
        {"temperature": 1.2, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.3, "min_p": 0.2},
    ],
)
def test_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    logits = random_logits(1, 20, 1)  # two blocks
    expected = warped(logits, options).softmax(-1)[0]
    draws = 20_000 if CARD else 40 if "top_k" in options else 100
    counts = torch.bincount(torch.tensor(drawn(logits.expand(draws, -1), [options] * draws, list(range(draws)))))
    counts = torch.nn.functional.pad(counts, (0, 20 - len(counts))).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    probs = expected[kept].double()
    assert chisquare(counts[kept].numpy(), (probs / probs.sum() * draws).numpy()).pvalue > 1e-3


def test_a_seed_draws_the_same_alone_and_in_company() -> None:
    logits = random_logits(4, 100, 2)
    options = [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.5}, {"temperature": 1.5, "top_k": 20}, {}]
    alone = [drawn(logits[i : i + 1], options[i : i + 1], [i])[0] for i in range(4)]
    assert drawn(logits, options, [0, 1, 2, 3]) == alone
    assert alone[3] == logits[3].argmax()


def test_a_tiny_top_p_and_a_tiny_temperature_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, -torch.inf]]).expand(3, -1)
    options = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1e-40}]
    tokens = drawn(logits, options, [3, 4, 5])
    assert tokens[0] == 1
    assert set(tokens) <= {1, 3}


def test_logits_that_are_no_numbers_end() -> None:
    assert 0 <= drawn(torch.full((1, 40), torch.nan), [{"temperature": 1.0, "top_p": 0.9}], [1])[0] <= 40
