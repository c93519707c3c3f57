"""The kernels against plain torch; by Triton's interpreter where there is no card (TRITON_INTERPRET=1)."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton")

from mqwen.engine.cuda.kernels import Scratch, add_norm, angles, attend, gated_product, product, rows_product, silu_mul
from mqwen.model.rotary import rotary_tables, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
EPS = 1e-6
CLOSE = {"atol": 2e-2, "rtol": 2e-2} if DTYPE is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}


def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, DTYPE)


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=EPS).type_as(x) * gain


@pytest.mark.parametrize("rows", [1])
def test_products(rows: int) -> None:
    torch.manual_seed(rows)
    x, gain, width = some(rows, 96), some(96), 96
    weight, bias, residual = some(75, width, scale=0.1), some(75), some(rows, 75)
    close = lambda a, b: torch.testing.assert_close(a, b, **CLOSE)  # noqa: E731
    out = torch.empty(rows, 75, device=DEVICE, dtype=DTYPE)
    close(product(x, weight, out, block_k=32), x @ weight.T)
    close(product(x, weight, out, bias=bias, gain=gain, eps=EPS, block_k=32), norm(x, gain) @ weight.T + bias)
    close(product(x, weight, out, residual=residual, block_k=64), residual + x @ weight.T)
    up, gate = some(75, width, scale=0.1), some(75, width, scale=0.1)
    n = norm(x, gain)
    close(gated_product(x, up, gate, gain, out, EPS, block_k=32), (n @ up.T) * F.silu(n @ gate.T))
    both = some(rows, 150)
    close(silu_mul(both, out), both[:, :75] * F.silu(both[:, 75:]))
    y, r = some(rows, 96), some(rows, 96)
    after = torch.empty_like(y)
    expected = r + y
    close(add_norm(y, r, gain, after, EPS), norm(expected, gain))
    close(r, expected)


@pytest.mark.parametrize("rows", [3, 16])
def test_few_rows(rows: int) -> None:
    x, weight, gate = some(rows, 96), some(75, 96, scale=0.1), some(75, 96, scale=0.1)
    bias, residual, out = some(75), some(rows, 75), torch.empty(rows, 75, device=DEVICE, dtype=DTYPE)
    torch.testing.assert_close(rows_product(x, weight, out, bias=bias, block_k=32), x @ weight.T + bias, **CLOSE)
    torch.testing.assert_close(rows_product(x, weight, out, residual=residual, block_k=64), x @ weight.T + residual, **CLOSE)
    torch.testing.assert_close(
        rows_product(x, weight, out, gate=gate, block_k=32), (x @ weight.T) * F.silu(x @ gate.T), **CLOSE
    )


@pytest.mark.parametrize("splits", [1, 3])
def test_attention_over_pages(splits: int) -> None:
    torch.manual_seed(splits)
    heads, channels, size = 2, 16, 4
    past = [0, 5, 37, 16]
    rows = len(past)
    width = heads * channels
    keys, values = some(64, heads, size, channels), some(64, heads, size, channels)
    tables = torch.randperm(63)[: rows * 12].view(rows, 12).add(1).int().to(DEVICE)
    positions = torch.tensor(past, dtype=torch.int32, device=DEVICE)
    bases = torch.tensor([10000.0, 10000.0 * 3, 10000.0, 20000.0], dtype=torch.float64, device=DEVICE)
    qkv = some(rows, 3 * width)
    logn = torch.tensor([1.0, 1.25, 1.0, 1.0], device=DEVICE)
    cos, sin = torch.empty(rows, channels // 2, device=DEVICE), torch.empty(rows, channels // 2, device=DEVICE)
    angles(positions, bases, cos, sin)
    for row in range(rows):
        c, s = rotary_tables(positions[row].cpu().view(1, 1), None, channels, bases[row].item())
        torch.testing.assert_close((cos[row].cpu(), sin[row].cpu()), (c[0, 0], s[0, 0]), atol=1e-5, rtol=1e-4)
    old_keys, old_values = keys.clone(), values.clone()
    out = torch.empty(rows, width, device=DEVICE, dtype=DTYPE)
    scratch = Scratch(rows, heads, channels, splits, torch.device(DEVICE))
    for dot in (False, True):
        attend(qkv, cos, sin, logn, keys, values, tables, positions, out, scratch, block=16, dot=dot)
    for row, before in enumerate(past):
        q, k, v = qkv[row].view(3, heads, channels)
        q, k = rotate(torch.stack((q, k)), cos[row], sin[row])
        q = q * logn[row].to(DTYPE)
        at = [(tables[row, n // size].item(), n % size) for n in range(before)]
        ks = torch.stack([old_keys[b, :, i] for b, i in at] + [k], 1)
        vs = torch.stack([old_values[b, :, i] for b, i in at] + [v], 1)
        weights = (torch.einsum("hd,hnd->hn", q.float(), ks.float()) / math.sqrt(channels)).softmax(-1)
        expected = torch.einsum("hn,hnd->hd", weights, vs.float()).flatten().to(DTYPE)
        torch.testing.assert_close(out[row], expected, **CLOSE)
        block, place = tables[row, before // size].item(), before % size
        torch.testing.assert_close((keys[block, :, place], values[block, :, place]), (k, v), **CLOSE)
