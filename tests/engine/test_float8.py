"""Weights in 8 bits: modules, kernels and the network of them against products of values rounded by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton")

from mqwen.engine import float8
from mqwen.engine.cuda import network, products8
from mqwen.engine.cuda.network8 import FEW8, Float8Network
from mqwen.engine.cuda.products import gated_product, product, rows_product
from mqwen.engine.cuda.products8 import many_product
from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.float8 import Float8Linear, is_float8, to_float8
from mqwen.engine.request import Request
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.float8 import LAYERS
from tests.engine.test_cuda_kernels import DEVICE, DTYPE, EPS, close, norm, some
from tests.engine.test_cuda_network import CONFIG


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest of e4m3's numbers, after scaling its largest to 448."""
    x = x.float()
    factor = 448 / x.abs().amax(1, keepdim=True)
    exponent = torch.frexp(x * factor)[1] - 1
    step = 2.0 ** (exponent.clamp(min=-6) - 3)
    return (x * factor / step).round() * step / factor


def models() -> tuple[MQWenLMHeadModel, MQWenLMHeadModel]:
    """One in 8 bits, and one whose weights are those that the other stands for."""
    torch.manual_seed(0)
    model = MQWenLMHeadModel(CONFIG).eval().to(DEVICE, DTYPE)
    plain = copy.deepcopy(model)
    to_float8(model)
    for block in plain.transformer.h:
        for name in LAYERS:
            weight = block.get_submodule(name).weight
            weight.data = rounded(weight.data).to(DTYPE)
    return model, plain


def test_a_layer() -> None:
    model, plain = models()
    assert is_float8(model) and not is_float8(plain)
    ours, theirs = model.transformer.h[0].attn.c_attn, plain.transformer.h[0].attn.c_attn
    assert ours.weight.element_size() == 1
    close((ours.weight.float() * ours.scale[:, None]).to(DTYPE), theirs.weight.data)
    x = some(2, 16, 64)
    with torch.inference_mode():
        close(ours(x), F.linear(rounded(x.flatten(0, 1)).to(DTYPE), theirs.weight, theirs.bias).view(2, 16, -1))
    others = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert len(others) == len(LAYERS) * CONFIG.num_hidden_layers


def drawn() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Two weights in 8 bits, and what they stand for."""
    weights = [float8.in_8_bits(some(80, 96, scale=0.1)) for _ in range(2)]
    return [(values, scales.flatten()) for values, scales in weights], [
        (values.float() * scales).to(DTYPE) for values, scales in weights
    ]


def test_one_row() -> None:
    torch.manual_seed(0)
    (weight, gate), (w, g) = drawn()
    x, gain, bias, residual, out = some(1, 96), some(96), some(80), some(1, 80), some(1, 80)
    normed = norm(x, gain)
    close(product(x, weight, out, bias=bias, gain=gain, eps=EPS, block_k=32), normed @ w.T + bias)
    close(product(x, weight, out, residual=residual, block_k=64), residual + x @ w.T)
    close(gated_product(x, weight, gate, gain, out, EPS, block_k=32), (normed @ w.T) * F.silu(normed @ g.T))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_inputs_in_float16(size: float) -> None:
    """Bfloat16's inputs go through float16, whose range is smaller."""
    torch.manual_seed(0)
    (weight, _), (w, _) = drawn()
    x = some(16, 96, scale=size).bfloat16()
    found = rows_product(x, weight, torch.empty(16, 80, device=DEVICE, dtype=torch.bfloat16), block_k=32).float()
    expected = x.float() @ w.float().T
    assert (found - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_few_rows(rows: int) -> None:
    torch.manual_seed(rows)
    (weight, gate), (w, g) = drawn()
    x, bias, residual, out = some(rows, 96), some(80), some(rows, 80), some(rows, 80)
    close(rows_product(x, weight, out, bias=bias, block_k=32), x @ w.T + bias)
    close(rows_product(x, weight, out, residual=residual, block_k=64), x @ w.T + residual)
    close(rows_product(x, weight, out, gate=gate, block_n=32, block_k=32), (x @ w.T) * F.silu(x @ g.T))


def test_many_rows() -> None:
    """Triton's interpreter rounds values next to a power of two wrongly, so that it is given none to round."""
    torch.manual_seed(0)
    values = (torch.randn(20, 96) * 8).to(float8.KIND).float()
    values[values.abs() < 2**-6] = 0
    values[:, 0] = 448
    x = (values * 2.0 ** torch.arange(-12, 8).unsqueeze(1)).to(DEVICE, DTYPE)
    found, scales = products8.in_8_bits(x)
    assert torch.equal(found.float().cpu(), values)
    torch.testing.assert_close(scales, 2.0 ** torch.arange(-12.0, 8).unsqueeze(1).to(DEVICE))
    if torch.cuda.is_available():
        x = some(20, 96)
    weight, bias = some(80, 96, scale=0.1), some(80)
    values, scales = float8.in_8_bits(weight)
    expected = rounded(x) @ rounded(weight).T + bias.float()
    torch.testing.assert_close(
        many_product(x, (values, scales.flatten()), bias).float(), expected, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_the_network(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """With queries in the place of what attention gives."""
    monkeypatch.setattr(network, "OVERLAP", torch.cuda.is_available())  # the interpreter has no kernel before another
    if not torch.cuda.is_available():  # see test_many_rows
        monkeypatch.setattr(products8, "in_8_bits", float8.in_8_bits)
    model, plain = models()
    x = some(rows, CONFIG.hidden_size)
    attention = lambda qkv, layer: qkv[:, : CONFIG.hidden_size].contiguous()  # noqa: E731
    expected, reference = x.clone(), plain if rows <= 16 else model
    with torch.inference_mode():
        ours = Float8Network(model, [], None)  # type: ignore[arg-type]
        for layer, block in enumerate(reference.transformer.h):
            expected = expected + block.attn.c_proj(attention(block.attn.c_attn(block.ln_1(expected)), layer))
            expected = expected + block.mlp(block.ln_2(expected))
        expected = reference.transformer.ln_f(expected)
        if rows <= 16:
            found = ours._one(x, attention) if rows == 1 else ours._few(x, attention, FEW8)
            close(found, reference.lm_head(expected))
        else:
            close(ours._many(x.clone(), attention), expected)


def test_an_engine(model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    """On a CPU by the modules alone: the tokens are those of the model in 8 bits, up to what one rounding changes."""
    model = copy.deepcopy(model)
    engine = Engine(model, processor, EngineSettings(float8=True))
    ids = list(range(5, 25))
    [event] = engine.generate_all([Request("one", ids, max_tokens=8, ignore_eos=True)])
    assert is_float8(model)
    for token in event.token_ids:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        placeholder = torch.tensor([model.config.image_token_id])
        best = logits.index_fill(0, placeholder, -torch.inf).max()
        assert best - logits[token] < 0.05 * logits.std()
        ids.append(token)


def test_sizes_that_do_not_fit_are_refused() -> None:
    config = copy.deepcopy(CONFIG)
    config.intermediate_size = 40
    with pytest.raises(ValueError, match=r"multiples of 16 channels; mlp\.w1 has 64 and 20: leave float8 out"):
        to_float8(MQWenLMHeadModel(config))
