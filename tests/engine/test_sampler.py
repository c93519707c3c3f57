"""The sampler against transformers' processors, and its independence of neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mqwen.engine.request import Request
from mqwen.engine.sampler import Sampled, Sampler, draw, uniform

PROMPT = (1, 4, 4, 7)


def sample(
    logits: torch.Tensor, options: Sequence[dict[str, Any]], *, seeds: Sequence[int], answer: Sequence[int] = ()
) -> Sampled:
    """Row i of the logits by options i and seed i; the rows lie in the sampler in reverse."""
    count = len(logits)
    ids = torch.zeros(count, 10, dtype=torch.int64)
    sampler = Sampler(count, logits.shape[1], ids)
    requests = [Request(str(i), PROMPT, **one) for i, one in enumerate(options)]
    rows = torch.arange(count - 1, -1, -1)
    sampler.admit(rows.tolist(), requests, seeds, [np.array(answer, np.int64)] * count)
    wanted = max((one.logprobs for one in requests if one.logprobs is not None), default=None)
    sampled = sampler.sample(logits, rows, torch.full((count,), 9), requests, wanted)
    assert torch.equal(ids[rows, 9], sampled.tokens)
    return sampled


def random_logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def warped(logits: torch.Tensor, options: dict[str, Any], ids: Sequence[int] = PROMPT) -> torch.Tensor:
    """What transformers makes of the logits (1, V) after the tokens `ids`."""
    processors = LogitsProcessorList()
    if penalty := options.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    for name, warper in {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}.items():
        if name in options:
            processors.append(warper(options[name]))
    return processors(torch.tensor([ids]), logits)


def test_temperature_zero_is_argmax() -> None:
    logits = random_logits(8, 50, 0)
    drawn = sample(logits, [{"temperature": 0.0}] * 7 + [{"temperature": 1.0}], seeds=range(8)).tokens
    assert drawn[:7].tolist() == logits[:7].argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.3},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.3, "min_p": 0.2},
        {"temperature": 1.2, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"temperature": 0.9, "repetition_penalty": 0.7, "top_k": 6, "top_p": 0.95},
    ],
)
def test_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    logits = random_logits(1, 12, 1)
    answer = [2, 2, 9]
    expected = warped(logits, options, [*PROMPT, *answer]).softmax(-1)[0]
    draws = 20_000
    drawn = sample(logits.expand(draws, -1), [options] * draws, seeds=range(draws), answer=answer).tokens
    counts = torch.bincount(drawn, minlength=12).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        probs = expected[kept].double()
        assert chisquare(counts[kept].numpy(), (probs / probs.sum() * draws).numpy()).pvalue > 1e-3


def test_presence_and_frequency_penalties_by_their_formula() -> None:
    """OpenAI's: logit - count * frequency - (count > 0) * presence, of what the answer holds and not the prompt."""
    logits = torch.zeros(1, 12)
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logprobs": 12, "temperature": 1.0}
    draws = 20_000
    drawn = sample(logits.expand(draws, -1), [options] * draws, seeds=range(draws), answer=[2, 2, 9])
    expected = torch.zeros(12).index_put((torch.tensor([2, 9]),), torch.tensor([-1.0, -0.75])).double().softmax(-1)
    counts = torch.bincount(drawn.tokens, minlength=12).numpy()
    assert chisquare(counts, (expected * draws).numpy()).pvalue > 1e-3
    one = drawn.logprob(0, 3)
    assert one.logprob == pytest.approx(-np.log(12))  # of the model, before penalties
    assert len(one.top) == 3


def test_penalties_count_what_was_sampled_and_touch_no_neighbour() -> None:
    sampler = Sampler(2, 4, torch.zeros(2, 2, dtype=torch.int64))
    penalized, plain = Request("a", [0], presence_penalty=5.0), Request("b", [0])
    sampler.admit([0, 1], [penalized, plain], [1, 1], [np.array([], np.int64)] * 2)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(2, -1)
    rows = torch.arange(2)
    drawn = [sampler.sample(logits, rows, rows, [penalized, plain]).tokens.tolist() for _ in range(4)]
    assert drawn == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_a_seed_draws_the_same_alone_and_in_company() -> None:
    logits = random_logits(3, 100, 2)
    options = [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.5, "top_k": 20}]
    alone = [sample(logits[i : i + 1], options[i : i + 1], seeds=[i]).tokens.item() for i in range(3)]
    assert sample(logits, options, seeds=range(3)).tokens.tolist() == alone


def test_a_tiny_top_p_and_a_tiny_temperature_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(3, -1)
    options = [{"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-46}]
    assert sample(logits, options, seeds=[3, 4, 5]).tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize("top_k", [None, torch.zeros(1, 1)])
def test_a_draw_at_the_very_end_stays_inside_the_nucleus(top_k: torch.Tensor | None) -> None:
    end = torch.tensor([1.0 - 2**-53], dtype=torch.float64)  # 1.0 in float32
    one = torch.ones(1, 1)
    logits = torch.tensor([[5.0, 5.0, -200.0, -200.0]])
    assert draw(logits, end, one * 0.9, top_k, one * 0).item() in (0, 1)


def test_uniform_numbers_are_uniform_and_splitmix64() -> None:
    seeds = torch.arange(100).repeat_interleave(200) * 12345
    points = uniform(seeds, torch.arange(200).repeat(100))
    assert chisquare(torch.histc(points.float(), 50, 0, 1).numpy()).pvalue > 1e-3
    # The first numbers of the published generator for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniform(torch.tensor([1234567] * 3), torch.arange(3))
    assert found.tolist() == [(number >> 11) * 2.0**-53 for number in published]
