"""Next tokens from logits, for all sequences of a step at once, on the device.

Each running sequence has a row of settings here too. A draw is a function of its seed and its position alone, so that
company, order and preemption change nothing.

Shapes: S sequences that sample, V vocabulary, R rows.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.device import STEPS, to_device
from mqwen.engine.request import Request, TokenLogprob

Ints = NDArray[np.int64]

SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def draws(request: Request) -> bool:
    return request.temperature > 0


def sorts(request: Request) -> bool:
    return request.temperature > 0 and (request.top_p < 1 or request.top_k > 0)


def penalizes(request: Request) -> bool:
    return request.repetition_penalty != 1 or request.presence_penalty != 0 or request.frequency_penalty != 0


@dataclass(frozen=True)
class Sampled:
    """tokens: (S,). logprobs: (S,) of these; top: (S, n) log probabilities and tokens; None where nobody asked.

    told: the tokens, where the card itself writes them into the host's memory.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    told: Tensor | None = None

    def to_host(self) -> "Sampled":
        """Without a wait: the values are there when the device has come so far."""
        top = None if self.top is None else (_to_host(self.top[0]), _to_host(self.top[1]))
        tokens = _to_host(self.tokens) if self.told is None else self.told
        return Sampled(tokens, None if self.logprobs is None else _to_host(self.logprobs), top)

    def logprob(self, place: int, count: int) -> TokenLogprob:
        """Of the sequence at `place`, with the `count` likeliest tokens."""
        assert self.logprobs is not None
        assert self.top is not None
        values, tokens = (part[place, :count].tolist() for part in self.top)
        return TokenLogprob(
            int(self.tokens[place]), self.logprobs[place].item(), tuple(zip(tokens, values, strict=True))
        )


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=True)


class Sampler:
    """rows: most sequences at once. ids: (R, ...), the table of all that is known, where sampled tokens go too."""

    def __init__(self, rows: int, vocab_size: int, ids: Tensor) -> None:
        device = ids.device
        self._ids, self._device, self._shape = ids, device, (rows, vocab_size)
        self._settings = torch.zeros(rows, len(SETTINGS), device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._generated: Tensor | None = None  # (R, V), how often the answer holds a token
        self._prompt: Tensor | None = None  # (R, V), whether the prompt does
        self._draw_on_card: Callable[..., Tensor] | None = None
        if device.type == "cuda":
            from mqwen.engine.cuda.draw import draw as draw_on_card  # brings Triton, which only such a machine has

            self._draw_on_card = draw_on_card
            self._told = cycle(torch.empty(STEPS, rows, dtype=torch.int64, pin_memory=True))

    def admit(self, rows: Many[int], requests: Many[Request], seeds: Many[int], answers: Many[Ints]) -> None:
        """Requests that run from now on. answers: what is generated of each so far."""
        places = self._send(np.array(rows))
        settings = [[getattr(request, name) for name in SETTINGS] for request in requests]
        self._settings[places] = self._send(np.array(settings, np.float32))
        self._seeds[places] = self._send(np.array(seeds))
        for row, request, answer in zip(rows, requests, answers, strict=True):
            if penalizes(request):
                self._admit_penalized(row, request.input_ids, answer)

    def _admit_penalized(self, row: int, prompt: Many[int], answer: Ints) -> None:
        """prompt: its tokens, pictures not expanded."""
        if self._generated is None:
            self._generated = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        assert self._prompt is not None
        self._prompt[row] = False
        self._prompt[row, self._send(np.array(prompt))] = True
        self._generated[row] = self._send(np.bincount(answer, minlength=self._shape[1]).astype(np.int32))

    def sample(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        requests: Many[Request],
        logprobs: int | None = None,
        allowed: NDArray[np.int32] | None = None,
    ) -> Sampled:
        """One token a sequence.

        logits: (S, V), any floating dtype. rows, positions: (S,), of the tokens to come. requests: they decide what is
        computed at all. logprobs: the most that one of them asks for. allowed: (S, V / 32), bits of the tokens that
        may come.
        """
        penalized = any(map(penalizes, requests))
        raw, told = logits, None
        if penalized:
            logits = self._penalize(logits.float(), rows)
        if allowed is not None:
            bits = self._send(allowed).unsqueeze(2) >> torch.arange(32, device=self._device, dtype=torch.int32)
            logits = logits.masked_fill((bits & 1).flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
        if self._draw_on_card is not None:
            told = next(self._told)[: len(logits)]
            tokens = self._draw_on_card(logits, self._settings, self._seeds, rows, positions, self._ids, told)
        elif not any(map(draws, requests)):
            tokens = logits.argmax(dim=-1)
        else:
            tokens = self._draw(logits.float(), rows, positions, any(map(sorts, requests)))
        if told is None:
            self._ids[rows, positions] = tokens
        if penalized:
            assert self._generated is not None
            self._generated[rows, tokens] += 1
        if logprobs is None:
            return Sampled(tokens, told=told)
        every = raw.float().log_softmax(dim=-1)
        values, likeliest = every.topk(logprobs)
        return Sampled(tokens, every.gather(1, tokens.unsqueeze(1)).squeeze(1), (values, likeliest), told)

    def _draw(self, logits: Tensor, rows: Tensor, positions: Tensor, sorts: bool) -> Tensor:
        temperature, top_p, top_k, min_p = self._settings[rows].T.unsqueeze(2)[:4]  # a column (S, 1) each
        scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.where(temperature > 0, 1)
        drawn = draw(scores, uniform(self._seeds[rows], positions), top_p, top_k if sorts else None, min_p)
        return drawn.where(temperature[:, 0] > 0, logits.argmax(dim=-1))

    def _penalize(self, logits: Tensor, rows: Tensor) -> Tensor:
        """A sequence without penalties has the factors 1, 0, 0, which change nothing, whatever its rows hold."""
        assert self._generated is not None
        assert self._prompt is not None
        repetition, presence, frequency = self._settings[rows].T.unsqueeze(2)[4:]
        counts = self._generated[rows]
        seen = (counts > 0) | self._prompt[rows]
        factors = torch.where(logits > 0, 1 / repetition, repetition)
        logits = torch.where(seen, logits * factors, logits)
        return logits - counts * frequency - (counts > 0) * presence

    def _send(self, values: NDArray[np.generic]) -> Tensor:
        return to_device(values, self._device)


def draw(scores: Tensor, points: Tensor, top_p: Tensor, top_k: Tensor | None, min_p: Tensor) -> Tensor:
    """(S,) tokens: the inverse of the distribution at the points.

    scores: (S, V), logits over temperature. points: (S,), from 0 up to, but not, 1. top_p, top_k, min_p: (S, 1);
    top_k None: neither top_k nor top_p leaves anything out. The order is transformers': the k likeliest, of these the
    nucleus (Holtzman et al. 2020, arXiv:1904.09751), of that what min_p leaves (Nguyen et al. 2024, arXiv:2407.01082).
    """
    probs = scores.softmax(dim=-1)
    if top_k is not None:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered = ordered * ((torch.arange(probs.shape[1], device=probs.device) < top_k) | (top_k == 0))
        before = ordered.cumsum(dim=-1) - ordered  # the mass ahead of each
        kept = (before < top_p * ordered.sum(dim=-1, keepdim=True)) | (top_p >= 1)
        kept[:, 0] = True  # top_p may be 0 in float32
        ordered = ordered * kept
        probs = torch.zeros_like(probs).scatter(1, order, ordered)  # company that sorts must not change a draw
    probs = probs * (probs >= min_p * probs.amax(dim=-1, keepdim=True))
    mass = probs.cumsum(dim=-1)
    total = mass[:, -1:]
    last = (mass < total).sum(dim=-1, keepdim=True)  # where rounding may put a point at the very end
    return torch.searchsorted(mass, points.unsqueeze(1).to(mass) * total, right=True).minimum(last).squeeze(1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """(S,) numbers in [0, 1), float64: SplitMix64 (Steele et al. 2014) of seed and position. int64 wraps around."""
    x = seeds + (positions + 1) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53
