"""Products in 8 bits against float32 ones of values that are rounded by hand, and a model that trains with them."""

import pytest
import torch
from torch import Tensor, nn

from mqwen.model import MQWenLMHeadModel
from mqwen.model.adapters import add_adapter
from mqwen.model.float8 import LAYERS
from mqwen.train.float8 import Float8Linear, use_float8
from mqwen.train.settings import SettingsError
from tests.benchmarks.options import AS_IT_IS, differences
from tests.train.conftest import Ranks
from tests.train.test_compute import COMPILER, TINY, train_with

E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of the mantissa, least exponent, largest value


def rounded(x: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """To the nearest of the numbers that 8 bits have, after scaling the largest of x to the largest of them."""
    mantissa, least, most = kind
    factor = most / x.abs().max()
    exponent = torch.frexp(x * factor)[1] - 1
    step = 2.0 ** (exponent.clamp(min=least) - mantissa)
    return (x * factor / step).round() * step / factor


def spread(*shape: int) -> Tensor:
    """Of many sizes: some are so small beside the largest that their exponent is the least."""
    return torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-6, 0)


@pytest.mark.parametrize("trained", [True, False])
def test_products_are_those_of_rounded_values(trained: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    linear.weight = nn.Parameter(spread(32, 48), requires_grad=trained)
    linear.__class__ = Float8Linear
    x, gradient = spread(2, 16, 48).requires_grad_(), spread(2, 16, 32)
    out = linear(x)
    out.backward(gradient)
    a, w, g = rounded(x.detach(), E4M3), rounded(linear.weight.detach(), E4M3), rounded(gradient, E5M2)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out, a @ w.T + linear.bias, **close)
    assert not torch.allclose(out, x @ linear.weight.T + linear.bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad, g @ w, **close)
    torch.testing.assert_close(linear.bias.grad, gradient.sum((0, 1)))
    if trained:
        torch.testing.assert_close(linear.weight.grad, g.flatten(0, 1).T @ a.flatten(0, 1), **close)
    else:
        assert linear.weight.grad is None


def test_zeros_stay_zeros() -> None:
    linear = nn.Linear(16, 16, bias=False)
    linear.__class__ = Float8Linear
    x = torch.zeros(16, 16, requires_grad=True)
    linear(x).backward(torch.zeros(16, 16))
    assert not x.grad.any() and not linear.weight.grad.any()


def small(**changes: int) -> MQWenLMHeadModel:
    config = TINY.config
    for name, value in changes.items():
        setattr(config, name, value)
    return MQWenLMHeadModel(config)


def test_blocks_alone_and_under_an_adapter() -> None:
    model = small()
    names = list(model.state_dict())
    use_float8(model)
    assert list(model.state_dict()) == names
    found = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert found == {f"transformer.h.{layer}.{name}" for layer in range(TINY.layers) for name in LAYERS}

    model = small()
    add_adapter(model, r=16, alpha=16, dropout=0.0, targets=("c_attn", "w1"), modules_to_save=())
    use_float8(model)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == TINY.layers * len(LAYERS)
    assert not any(layer.weight.requires_grad for layer in layers)
    assert "Float8Linear" not in {type(one).__name__ for one in model.transformer.h[0].attn.c_attn.lora_A.modules()}


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"multiples of 16 channels; mlp\.w1 has 32 and 20: leave it out"):
        use_float8(small(intermediate_size=40))


@pytest.mark.parametrize("name", ["8 bits", "8 bits, compiled, selective recomputation"])
def test_a_model_learns_as_much(ranks: Ranks, name: str) -> None:
    plain = ranks.run(1, train_with, AS_IT_IS, COMPILER)[0]
    found = ranks.run(1, train_with, name, COMPILER)[0]
    losses, gradients = differences(found, plain)
    learnt = max(plain.losses) - min(plain.losses)
    print(f"{name}: losses differ by {losses / learnt:.4f} of what is learnt, gradients by {gradients:.4f}")
    assert losses < 0.05 * learnt
    assert gradients > 1e-3
