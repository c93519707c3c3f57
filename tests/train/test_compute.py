"""Memory and speed options change no loss and no gradient, and no packing is compiled for again."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from mqwen.model import MQWenLMHeadModel
from mqwen.train.compute import prepare
from mqwen.train.settings import ComputeSettings
from tests.benchmarks.h200.cases import graphs
from tests.benchmarks.options import ALL, AS_IT_IS, OPTIONS, Sizes, Trained, differences, trained
from tests.train.conftest import Ranks

TINY = Sizes(steps=20, channels=32, layers=2, vocabulary=300, rows=2, length=96)
COMPILED = [name for name, option in OPTIONS.items() if option.compile]
COMPILER = "aot_eager"  # all of torch.compile but the slow last part: that one is for `soak`


Train = Callable[[str, str], Trained]


def by(compiler: str) -> Callable:
    """torch.compile, by this compiler whatever is asked for."""
    compiled = torch.compile
    return lambda *arguments, **named: compiled(*arguments, **{**named, "backend": compiler})


def train_with(rank: int, workers: int, name: str, compiler: str) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", by(compiler))
        return trained(name, TINY)


@pytest.fixture(scope="module")
def with_option(ranks: Ranks) -> Train:
    """What comes of an option and a compiler; once each."""
    return cache(lambda name, compiler: ranks.run(1, train_with, name, compiler)[0])


@pytest.mark.parametrize(
    ("name", "compiler"),
    [(name, COMPILER) for name in ALL[1:]]
    + [pytest.param(name, "inductor", marks=pytest.mark.soak) for name in COMPILED],
)
def test_no_option_changes_losses_or_gradients(with_option: Train, name: str, compiler: str) -> None:
    plain, found = with_option(AS_IT_IS, COMPILER), with_option(name, compiler)
    losses, gradients = differences(found, plain)
    print(f"{name}, {compiler}: {found.memory >> 10} KiB, plain {plain.memory >> 10} KiB")
    assert max(plain.losses) > 1.05 * min(plain.losses)  # it learns
    assert losses < 1e-5 * max(plain.losses)
    assert gradients < 1e-5


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("selective recomputation", AS_IT_IS),
        ("full recomputation", "selective recomputation"),
        (AS_IT_IS, "without labelled positions alone: all logits"),
    ],
)
def test_memory_options_save_memory(with_option: Train, less: str, more: str) -> None:
    assert with_option(less, COMPILER).memory < 0.97 * with_option(more, COMPILER).memory


def graphs_after_each(rank: int, workers: int, packings: list[list[int]]) -> list[int]:
    """How many graphs there are after a forward and a backward pass over each packing of two rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, found = MQWenLMHeadModel(TINY.config).train(), list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", by(COMPILER))
        prepare(model, ComputeSettings(compile=True))
    for lengths in packings:
        row = torch.tensor([n for n, length in enumerate(lengths, start=1) for _ in range(length)])
        ids = torch.randint(0, 290, (2, len(row)))
        inputs = {"input_ids": ids, "labels": ids, "segment_ids": row.expand(2, -1)}
        model(**inputs, use_cache=False, logits_to_keep="labels", row_length=64).loss.backward()
        found.append(graphs())
    return found


def test_other_packings_are_not_compiled_for(ranks: Ranks) -> None:
    """The second may be: a number of runs that has changed is from then on one that changes."""
    packings = [[20, 44], [10, 20, 34], [5, 59], [8, 8, 8, 8, 8, 24], [7, 9, 30], [1, 2, 3, 4, 5, 6, 7], [32, 32]]
    found = ranks.run(1, graphs_after_each, packings)[0]
    assert found[0] > 0
    assert found[1:] == [found[1]] * (len(packings) - 1)
