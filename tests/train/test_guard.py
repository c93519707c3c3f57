"""Steps that would harm the weights are left out, counted, and end the run where they are many."""

import itertools
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any, cast

import pytest
import torch

from mqwen.model import MQWenConfig
from mqwen.storage import locate
from mqwen.train import worker
from mqwen.train.guard import FEWEST, FOLDER, DivergedError, Guard
from mqwen.train.loop import Data, Progress, StepRecord, Watch, train
from mqwen.train.settings import GuardSettings, RunSettings
from tests.train.conftest import Ranks
from tests.train.making import blank_row, fresh_strategy, rows_from
from tests.train.test_checkpoint import assert_same, flat, run_of


def poison_nothing(strategy: Any, step: int) -> None:
    pass


def poison_gradient(strategy: Any, step: int) -> None:
    """A gradient that is no number, as an overflow makes, on one rank alone."""
    if step == 2 and torch.distributed.get_rank() == 0:
        parameter = next(p for p in strategy.model.parameters() if p.grad is not None)
        parameter.grad.to_local()[0] = math.nan


def train_guarded(
    rank: int, workers: int, settings: RunSettings, poison: Callable[[Any, int], None]
) -> tuple[list[StepRecord], dict[int, dict[str, Any]], str, list[str]]:
    """Records, the state after each step, what was printed, and the keys of the second step's samples."""
    strategy, states, records = fresh_strategy(settings), dict[int, dict[str, Any]](), list[StepRecord]()
    guard, clip = Guard(settings.guard, settings.optimizer.clip, run_of(settings)), strategy.step

    def step(accepts: Callable[[float], bool]) -> float:
        poison(strategy, len(records) + 1)
        return clip(accepts)

    def on_step(record: StepRecord) -> None:
        records.append(record)
        values = flat(strategy.state()).items()
        states[record.step] = {name: value for name, value in values if isinstance(value, torch.Tensor)}

    strategy.step = step  # type: ignore[method-assign]
    rows = list(itertools.islice(rows_from(settings, Progress()), 15))
    keys = [key for row in rows[5:10] for key in row.keys]
    with redirect_stdout(StringIO()) as printed:
        train(
            replace(settings, steps=3),
            strategy,
            Data(iter(rows[rank::workers]), blank_row(settings)),
            Progress(),
            Watch(on_step, lambda progress: None, accepts=guard.accepts),
        )
    return records, states, printed.getvalue(), keys


def test_after_an_error_that_would_come_again_workers_have_nothing_to_do(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trained = run_of(settings), list[str]()

    def diverges(task: Any) -> None:
        trained.append("once")
        raise DivergedError("too many steps were left out")

    monkeypatch.setattr(worker, "_train", diverges)
    task = worker.Task(settings, run, MQWenConfig(), None, cast(Any, None), cast(Any, None), 0.0, 0.0)
    with pytest.raises(DivergedError):
        worker.work({"task": task})
    worker.work({"task": task})
    assert trained == ["once"]
    assert (run / worker.ENDED).read_bytes() == b"DivergedError: too many steps were left out"


def test_a_gradient_that_is_no_number_changes_nothing(ranks: Ranks, settings: RunSettings) -> None:
    found = ranks.run(2, train_guarded, settings, poison_gradient)
    for records, states, _, _ in found:
        assert math.isnan(records[1].gradient_norm)
        assert math.isfinite(records[1].loss)
        assert_same(states[2], states[1])
    _, _, printed, keys = found[0]
    file = run_of(settings) / FOLDER / "step-00000002.json"
    assert printed == f"step 2 is left out: its gradient norm is nan; its samples are in {file}\n"
    record = json.loads(file.read_bytes())
    assert sorted(record["keys"]) == sorted(keys)
    assert record["reason"] == "its gradient norm is nan"
    (_, states, printed, _), _ = ranks.run(2, train_guarded, replace(settings, name="sound"), poison_nothing)
    assert printed == ""
    assert any(not torch.equal(states[2][name], states[1][name]) for name in states[1] if name.startswith("/model/"))


def judge(
    rank: int, workers: int, settings: RunSettings, before: list[tuple[float, float]], steps: list[tuple[float, float]]
) -> list[bool | str]:
    guard = Guard(settings.guard, settings.optimizer.clip, locate(settings.runs) / "run", before)
    verdicts: list[bool | str] = []
    for number, (loss, norm) in enumerate(steps):
        try:
            verdicts.append(guard.accepts(number, loss, lambda: ["a key"], norm))
        except DivergedError as error:
            verdicts.append(str(error))
    return verdicts


def test_a_spike_is_many_times_the_usual(ranks: Ranks, settings: RunSettings) -> None:
    usual = [(2.0, 1.0 + 0.01 * number) for number in range(FEWEST)]
    spikes = [(21.0, 1.1), (2.0, 12.0), (19.0, 1.1), (2.0, 9.0), (math.inf, 1.0), (2.0, 1.0)]
    expected = [False, False, True, True, False, True]
    assert ranks.run(1, judge, settings, usual, spikes) == [expected]
    # A run that goes on knows what was usual, and a fresh one sees no spike in its first steps.
    assert ranks.run(1, judge, settings, [*usual, *spikes], spikes) == [expected]
    assert ranks.run(1, judge, settings, usual[1:], spikes[:1]) == [[True]]
    never = replace(settings, guard=GuardSettings(spike=0))
    assert ranks.run(1, judge, never, usual, spikes) == [[True, True, True, True, False, True]]
    learned = [(0.001, 0.01)] * FEWEST  # a gradient that clipping lets through whole does no harm
    assert ranks.run(1, judge, settings, learned, [(0.1, settings.optimizer.clip), (0.1, 1.1)]) == [[True, False]]


def test_too_many_end_the_run_with_the_samples(ranks: Ranks, settings: RunSettings) -> None:
    settings = replace(settings, guard=GuardSettings(most=2))
    (verdicts,) = ranks.run(1, judge, settings, [], [(math.nan, 1.0)] * 3)
    assert verdicts[:2] == [False, False]
    assert verdicts[2] == (
        "3 of the last 3 steps were left out, --guard.most allows 2; step 2: its loss is nan. "
        "Lower --optimizer.learning-rate, or look at the samples a key"
    )
