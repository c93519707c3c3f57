"""Every strategy computes what one process without sharding computes, and goes on from another's checkpoint."""

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mqwen.train import checkpoint
from mqwen.train.loop import LOSS_ONLY, Evaluation, Progress
from mqwen.train.saver import Saver
from mqwen.train.settings import EvaluationSettings, ParallelSettings, RunSettings
from tests.train.conftest import Pair, Ranks
from tests.train.making import fresh_strategy, held_out_rows, other_seed, rows_from, train_ranks
from tests.train.test_checkpoint import assert_same, flat, load_latest, run_of
from tests.train.test_loop import GOLDEN, ROWS, fifty_steps, plain_loop, run_many

CACHE = "TORCH_EXTENSIONS_DIR"  # where torch puts what it compiles


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what the two processes compile. They start when they are first wanted, with this environment."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder))
        patch.setenv("PATH", "")
        yield folder


def losses_and_norms(rank: int, workers: int, settings: RunSettings) -> tuple[list[float], list[float]]:
    records, _ = train_ranks(settings, fresh_strategy(settings), Progress(), rank, workers, lambda _: None, ROWS)
    return [record.loss for record in records], [record.gradient_norm for record in records]


def with_parallel(settings: RunSettings, **options: Any) -> RunSettings:
    return replace(settings, parallel=ParallelSettings(**options))


@pytest.mark.parametrize(
    ("strategy", "offload"),
    [("zero1", "nothing"), ("zero2", "nothing"), ("zero2", "optimizer"), ("zero3", "nothing"), ("zero3", "weights")],
)
def test_zero_computes_the_plain_loop(
    compiled: Path, pair: Pair, settings: RunSettings, strategy: str, offload: str
) -> None:
    expected, norms = plain_loop(settings, list(itertools.islice(rows_from(settings, Progress()), ROWS)))
    for found in pair.run(losses_and_norms, with_parallel(settings, strategy=strategy, offload=offload)):
        assert found[0] == pytest.approx(expected, rel=1e-4)
        assert found[1] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "options"),
    [(4, {"shard": 2, "workers": 4}), (2, {"offload": "weights"}), (2, {"reshard_after_forward": False})],
)
def test_fsdp2s_options_compute_the_plain_loop(
    ranks: Ranks, settings: RunSettings, workers: int, options: dict[str, Any]
) -> None:
    expected, _ = plain_loop(settings, list(itertools.islice(rows_from(settings, Progress()), ROWS)))
    for found, _ in ranks.run(workers, losses_and_norms, with_parallel(settings, **options)):
        assert found == pytest.approx(expected, rel=1e-4)


def half_precision(rank: int, workers: int, settings: RunSettings) -> tuple[list[float], dict[str, torch.Tensor]]:
    strategy = fresh_strategy(settings)
    records, _ = train_ranks(settings, strategy, Progress(), rank, workers, lambda _: None, ROWS)
    state = strategy.state()
    return [record.loss for record in records], flat(state["model"]) | flat(state["optimizer"]["state"])


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_bfloat16_keeps_its_weights_in_float32(pair: Pair, settings: RunSettings, strategy: str) -> None:
    expected, _ = plain_loop(settings, list(itertools.islice(rows_from(settings, Progress()), ROWS)))
    half = replace(with_parallel(settings, strategy=strategy), model=replace(settings.model, precision="bfloat16"))
    for found, state in pair.run(half_precision, half):
        assert found == pytest.approx(expected, rel=1e-2)
        assert found != pytest.approx(expected, rel=1e-6)  # it did compute in fewer bits
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        weights = [tensor for name, tensor in state.items() if name.endswith("mlp.w1.weight")]
        assert all(not torch.equal(weight, weight.bfloat16().float()) for weight in weights)


def go_on(rank: int, workers: int, settings: RunSettings, rows: int) -> tuple[list[float], dict[str, Any]]:
    """From the newest checkpoint, if there is one, so many rows on: losses, and the state that was loaded."""
    strategy, progress = fresh_strategy(settings), Progress()
    if checkpoint.committed(run_of(settings)):
        strategy = fresh_strategy(other_seed(settings))  # nothing of the saved weights is there by chance
        progress = load_latest(settings, strategy)
    loaded = flat(strategy.state())
    saver = Saver(run_of(settings), settings)

    def save(progress: Progress) -> None:
        saver.save(strategy.state(), progress)

    records, _ = train_ranks(settings, strategy, progress, rank, workers, save, rows)
    saver.wait()
    return [record.loss for record in records], loaded


def test_a_run_changes_its_strategy_at_every_checkpoint(ranks: Ranks, pair: Pair, settings: RunSettings) -> None:
    """Weights and optimizer state go along, so its losses are those of a run that never changed."""
    settings = replace(settings, steps=10)
    expected, _ = ranks.run(1, go_on, replace(settings, name="undisturbed"), 50)[0]
    losses: list[float] = []
    for strategy in ("fsdp2", "zero1", "zero2", "zero3", "fsdp2"):
        losses += pair.run(go_on, with_parallel(settings, strategy=strategy), 10)[0][0]
    assert losses == pytest.approx(expected, rel=1e-4)
    _, undisturbed = ranks.run(1, go_on, replace(settings, name="undisturbed"), 0)[0]
    _, found = ranks.run(1, go_on, settings, 0)[0]
    assert found.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        if "post_layernorm" in name:
            continue  # it gets no gradient: FSDP2 does not count its steps, ZeRO does
        if name.endswith("/step"):
            assert found[name] == value == 10
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)


def train_to_held_out_loss(rank: int, workers: int, settings: RunSettings, rows: int) -> float:
    """Trains, with a checkpoint at the end, and gives the loss after it."""
    strategy, found = fresh_strategy(settings), list[Evaluation]()
    saver = Saver(run_of(settings), settings)

    def save(progress: Progress) -> None:
        saver.save(strategy.state(), progress)

    train_ranks(settings, strategy, Progress(), rank, workers, save, rows, found.append)
    saver.wait()
    return found[-1].loss


def hand_on(rank: int, workers: int, settings: RunSettings) -> float:
    """The held-out loss of the newest checkpoint, which is written again as the next step's."""
    strategy = fresh_strategy(other_seed(settings))
    progress = load_latest(settings, strategy)
    rows = list(held_out_rows(settings).share(0, 1))
    strategy.model.eval()
    with torch.no_grad():
        losses = [strategy.model(**row.inputs, num_items_in_batch=1, **LOSS_ONLY).loss.item() for row in rows]
    saver = Saver(run_of(settings), settings)
    saver.save(strategy.state(), replace(progress, step=progress.step + 1))
    saver.wait()
    return sum(losses) / sum(row.supervised for row in rows)


def test_the_held_out_loss_goes_from_strategy_to_strategy(pair: Pair, settings: RunSettings) -> None:
    settings = replace(settings, evaluation=EvaluationSettings(settings.data.dataset))
    trained = pair.run(train_to_held_out_loss, with_parallel(settings, strategy="fsdp2"), 10)[0]
    found = [pair.run(hand_on, with_parallel(settings, strategy=strategy))[0] for strategy in ("zero2", "fsdp2")]
    assert found == pytest.approx([trained] * 2, rel=1e-5)
    saved = checkpoint.committed(run_of(settings))
    assert [checkpoint.read_commit(one).settings["parallel"]["strategy"] for one in saved] == [
        "fsdp2",
        "zero2",
        "fsdp2",
    ]


def refuse_steps(
    rank: int, workers: int, settings: RunSettings, gradient: float
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """A step that is accepted, and one, its gradient so much larger, that is not: the norms that were asked about, and
    the state after each."""
    strategy, asked = fresh_strategy(settings), list[float]()
    row = next(rows_from(settings, Progress()))
    for factor, answer in ((1.0, True), (gradient, False)):
        before = flat(strategy.state())
        loss = strategy.model(**row.inputs, num_items_in_batch=workers, **LOSS_ONLY).loss
        strategy.backward(loss * factor, last=True)

        def accepts(norm: float, answer: bool = answer) -> bool:
            asked.append(norm)
            return answer

        assert str(strategy.step(accepts)) == str(asked[-1])
    return asked, before, flat(strategy.state())


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", [2.0, math.nan])
def test_zero_leaves_a_refused_step_out(
    pair: Pair, settings: RunSettings, strategy: str, precision: Any, gradient: float
) -> None:
    settings = replace(with_parallel(settings, strategy=strategy), model=replace(settings.model, precision=precision))
    for asked, before, after in pair.run(refuse_steps, settings, gradient):
        assert len(asked) == 2  # once a step
        assert math.isfinite(asked[0])
        assert math.isfinite(asked[1]) == math.isfinite(gradient)
        values = [name for name, value in before.items() if isinstance(value, torch.Tensor)]
        assert_same({name: after[name] for name in values}, {name: before[name] for name in values})


@pytest.mark.soak
@pytest.mark.parametrize(
    ("workers", "strategy"),
    [(1, "fsdp2"), (2, "fsdp2"), (3, "fsdp2"), (4, "fsdp2"), (2, "zero1"), (2, "zero2"), (2, "zero3")],
)
def test_fifty_steps_have_the_golden_losses(
    ranks: Ranks, pair: Pair, settings: RunSettings, workers: int, strategy: str
) -> None:
    """A step has five rows, which neither 2 nor 3 nor 4 divides."""
    settings = with_parallel(fifty_steps(settings), strategy=strategy)
    found = pair.run(run_many, settings) if workers == 2 else ranks.run(workers, run_many, settings)
    golden = json.loads(GOLDEN.read_text())
    for records, _ in found:
        losses = [record.loss for record in records]
        assert losses == pytest.approx(golden, rel=1e-4)
    largest = max(abs(loss / expected - 1) for loss, expected in zip(losses, golden, strict=True))
    print(f"{strategy} on {workers}: largest relative difference {largest:.1e}")


def test_nothing_was_compiled(compiled: Path, pair: Pair, settings: RunSettings) -> None:
    pair.run(losses_and_norms, with_parallel(settings, strategy="zero1"))
    assert pair.run(environment) == [(str(compiled), "")] * 2
    assert list(compiled.iterdir()) == []


def environment(rank: int, workers: int) -> tuple[str, str]:
    return os.environ[CACHE], os.environ["PATH"]
