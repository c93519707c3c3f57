"""The kernels against plain torch: on a card, or, slowly, by Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton")

from mqwen.engine.cuda.kernels import TILE, Scratch, add_norm, attend, attend_prompts, begin, silu_mul, take_in
from mqwen.engine.cuda.products import gated_product, product, rows_product
from mqwen.model.rotary import rotary_tables, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
EPS = 1e-6
CLOSE = {"atol": 2e-2, "rtol": 2e-2} if DTYPE is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
OVERLAP = torch.cuda.is_available()


def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, DTYPE)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=EPS).type_as(x) * gain


def test_one_row() -> None:
    torch.manual_seed(0)
    x, gain, weight, bias, residual = some(1, 96), some(96), some(75, 96, scale=0.1), some(75), some(1, 75)
    up, gate, out = some(75, 96, scale=0.1), some(75, 96, scale=0.1), torch.empty(1, 75, device=DEVICE, dtype=DTYPE)
    for overlap in {False, OVERLAP}:
        close(product(x, weight, out, block_k=32, overlap=overlap), x @ weight.T)
        normed = norm(x, gain)
        ours = product(x, weight, out, bias=bias, gain=gain, eps=EPS, block_k=32, overlap=overlap)
        close(ours, normed @ weight.T + bias)
        close(product(x, weight, out, residual=residual, block_k=64, overlap=overlap), residual + x @ weight.T)
        ours = gated_product(x, up, gate, gain, out, EPS, block_k=32, overlap=overlap)
        close(ours, (normed @ up.T) * F.silu(normed @ gate.T))


@pytest.mark.parametrize("rows", [3, 16])
def test_few_rows(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, gate = some(rows, 96), some(75, 96, scale=0.1), some(75, 96, scale=0.1)
    bias, residual, out = some(75), some(rows, 75), torch.empty(rows, 75, device=DEVICE, dtype=DTYPE)
    close(rows_product(x, weight, out, bias=bias, block_k=32), x @ weight.T + bias)
    close(rows_product(x, weight, out, residual=residual, block_k=64), x @ weight.T + residual)
    for overlap in {False, OVERLAP}:
        ours = rows_product(x, weight, out, gate=gate, block_k=32, ahead=64, overlap=overlap)
        close(ours, (x @ weight.T) * F.silu(x @ gate.T))
    both = some(rows, 150)
    close(silu_mul(both, out), both[:, :75] * F.silu(both[:, 75:]))
    y, r, gain = some(rows, 96), some(rows, 96), some(96)
    expected = r + y
    close(add_norm(y, r, gain, torch.empty_like(y), EPS), norm(expected, gain))
    close(r, expected)


def in_order(pages: torch.Tensor, table: torch.Tensor, count: int) -> torch.Tensor:
    """(H, count, D): the first positions of a sequence."""
    return pages[table].transpose(0, 1).flatten(1, 2)[:, :count]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("extended", [False, True])
def test_attention_over_pages(splits: int, extended: bool) -> None:
    torch.manual_seed(splits)
    heads, channels, size, longest = 2, 16, 4, 48
    past = [0, 5, 37, 16]
    count, width = len(past), heads * channels
    keys, values = some(64, heads, size, channels), some(64, heads, size, channels)
    tables = (torch.randperm(63)[: 5 * 12].view(5, 12) + 1).to(DEVICE)
    rows = torch.tensor([3, 0, 4, 1], device=DEVICE)
    positions = torch.tensor(past, device=DEVICE)
    angles = [
        torch.cat(rotary_tables(torch.arange(longest).view(1, -1), torch.full((1, 1), a), channels, 1e4), -1)[0]
        for a in (1.0, 3.0)
    ]
    rotary = torch.cat(angles).to(DEVICE)
    places = torch.tensor([0, longest, 0, 0, longest], device=DEVICE)
    logn = torch.linspace(1, 1.5, longest).to(DEVICE) if extended else None
    ids, embedding = torch.randint(0, 50, (5, longest)).to(DEVICE), some(50, width)
    x, turns = torch.empty(count, width, device=DEVICE, dtype=DTYPE), torch.empty(count, channels, device=DEVICE)
    begin(ids, places, rotary, rows, positions, embedding, x, turns)
    close(x, embedding[ids[rows, positions]])
    close(turns, rotary[places[rows] + positions])

    qkv = some(count, 3 * width)
    old_keys, old_values = keys.clone(), values.clone()
    out = torch.empty(count, width, device=DEVICE, dtype=DTYPE)
    scratch = Scratch(count, heads, channels, splits, torch.device(DEVICE))
    for _ in range(2):  # the counters are zero again
        attend(qkv, turns, logn, keys, values, tables, rows, positions, out, scratch, block=16)
    again = old_keys.clone(), old_values.clone()
    queries = take_in(qkv, turns, logn, *again, tables, rows, positions)
    close(again[0], keys)
    close(again[1], values)
    for i, before in enumerate(past):
        q, k, v = qkv[i].view(3, heads, channels)
        q, k = rotate(torch.stack((q, k)), *turns[i].chunk(2))
        q = q if logn is None else q * logn[before].to(DTYPE)
        close(queries[i], q)
        ks, vs = (
            torch.cat((in_order(old, tables[rows[i]], before), one.unsqueeze(1)), 1)
            for old, one in ((old_keys, k), (old_values, v))
        )
        weights = (torch.einsum("hd,hnd->hn", q.float(), ks.float()) / math.sqrt(channels)).softmax(-1)
        close(out[i], torch.einsum("hn,hnd->hd", weights, vs.float()).flatten().to(DTYPE))


def test_prompts_over_pages() -> None:
    """Pieces at the beginning and in the midst of prompts, longer than a program takes, with tokens of nobody after."""
    torch.manual_seed(0)
    heads, channels, size = 3, 16, 4
    pieces = [(2, 0, 70), (0, 37, 9), (3, 5, 1)]  # row, first position, how many
    keys, values = some(128, heads, size, channels), some(128, heads, size, channels)
    tables = (torch.randperm(127)[: 4 * 20].view(4, 20) + 1).to(DEVICE)
    rows = torch.tensor([row for row, _, count in pieces for _ in range(count)] + [1, 1], device=DEVICE)
    positions = [position for _, start, count in pieces for position in range(start, start + count)]
    tiles = torch.tensor([[0, TILE, 70, 79, 0, 0], [TILE, 70 - TILE, 9, 1, 0, 0]], device=DEVICE)
    query = some(len(rows), heads, channels)
    where = tables, rows, torch.tensor([*positions, 0, 0], device=DEVICE)
    ours = attend_prompts(query.clone(), keys, values, *where, tiles, block=16)
    first = 0
    for row, start, count in pieces:
        ks, vs = in_order(keys, tables[row], start + count), in_order(values, tables[row], start + count)
        scores = torch.einsum("qhd,hnd->hqn", query[first : first + count].float(), ks.float()) / math.sqrt(channels)
        unseen = torch.ones(count, start + count, dtype=torch.bool, device=DEVICE).triu(start + 1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        close(ours[first : first + count], torch.einsum("hqn,hnd->qhd", weights, vs.float()).flatten(1).to(DTYPE))
        first += count
