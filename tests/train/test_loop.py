"""The loop: any number of workers computes what one process without sharding computes, step by step."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn

from mqwen.data.batch import Batch
from mqwen.data.errors import DataError
from mqwen.data.sample import Sample
from mqwen.train.build import starting_point
from mqwen.train.loop import Evaluation, Progress, StepRecord
from mqwen.train.optimizer import rate_factor
from mqwen.train.settings import EvaluationSettings, OptimizerSettings, RunSettings, SettingsError
from tests.data.making import random_sample, write_dataset
from tests.train.conftest import Ranks
from tests.train.making import fresh_model, fresh_strategy, held_out_rows, rows_from, train_ranks

GOLDEN = Path(__file__).parent / "golden_losses.json"

ROWS = 21  # four steps of five rows, and a fifth of one
FACTORS = [0.5, 1.0, 1.0, 0.8535533906, 0.5]  # of six steps, the first two of which warm up


def concatenated(rows: list[Batch]) -> dict[str, torch.Tensor]:
    """Rows of unlike width as one batch, padded on the right."""
    width = max(row.inputs["input_ids"].shape[1] for row in rows)
    together = {"pixel_values": torch.cat([row.inputs["pixel_values"] for row in rows])}
    for name, fill in (("input_ids", 0), ("labels", -100), ("segment_ids", 0)):
        together[name] = torch.cat(
            [nn.functional.pad(row.inputs[name], (0, width - row.inputs[name].shape[1]), value=fill) for row in rows]
        )
    return together


def plain_loop(settings: RunSettings, rows: list[Batch]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms: one process, no sharding, torch's AdamW, one forward pass a step, with all logits."""
    model, options = fresh_model(settings), settings.optimizer
    groups: list[dict] = []
    for name, parameter in model.named_parameters():
        rate = 1e-3 if name.startswith("visual.") else 1e-2
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "full": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=options.betas)
    losses, norms = [], []
    for factor, start in zip(FACTORS, range(0, len(rows), 5), strict=True):
        loss = model(**concatenated(rows[start : start + 5])).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * factor
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), options.clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def run_rank(
    rank: int, workers: int, settings: RunSettings, end: int
) -> tuple[list[StepRecord], list[Progress], Progress]:
    saved: list[Progress] = []
    records, last = train_ranks(settings, fresh_strategy(settings), Progress(), rank, workers, saved.append, end)
    return records, saved, last


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_computes_the_plain_loop(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    rows = list(itertools.islice(rows_from(settings, Progress()), ROWS))
    assert {row.images for row in rows} > {0}
    expected, norms = plain_loop(settings, rows)
    assert max(expected) > 1.2 * min(expected)  # it learns, so that a step left out would show

    for records, saved, last in ranks.run(workers, run_rank, settings, ROWS):
        assert [record.loss for record in records] == pytest.approx(expected, rel=1e-4)
        assert [record.gradient_norm for record in records] == pytest.approx(norms, rel=1e-3)
        assert [record.step for record in records] == [1, 2, 3, 4, 5]
        assert [record.learning_rate for record in records] == pytest.approx([1e-2 * factor for factor in FACTORS])
        for step, record in enumerate(records):
            mine = rows[step * 5 : step * 5 + 5]
            assert record.tokens == sum(int((row.inputs["labels"] != -100).sum()) for row in mine)
            assert record.images == sum(len(row.inputs["pixel_values"]) for row in mine)
            assert record.positions == sum(row.positions for row in mine)
        tokens, seconds = ([0, *accumulate(getattr(r, name) for r in records)] for name in ("tokens", "seconds"))
        ends = [(2, rows[9]), (4, rows[19]), (5, rows[20])]
        assert saved == [
            Progress(step, row.place, tokens[step], seconds[step], epochs=row.epochs) for step, row in ends
        ]
        assert last == saved[-1]


def continue_rank(rank: int, workers: int, settings: RunSettings, progress: Progress) -> tuple[int, int, Progress]:
    saved: list[Progress] = []
    records, last = train_ranks(settings, fresh_strategy(settings), progress, rank, workers, saved.append)
    return len(records), len(saved), last


@pytest.mark.parametrize("step", [6, 7])
def test_a_finished_run_started_again_changes_nothing(ranks: Ranks, settings: RunSettings, step: int) -> None:
    done = Progress(step, (0, 1, 2))
    assert ranks.run(1, continue_rank, settings, done) == [(0, 0, done)]


def test_a_finished_run_without_data_is_not_written_again(ranks: Ranks, settings: RunSettings) -> None:
    """Its last step is none of those that get a checkpoint by their number."""
    _, _, last = ranks.run(1, run_rank, settings, ROWS)[0]
    assert last.step == 5
    assert ranks.run(1, run_no_rows, settings, last) == [[]]


def run_no_rows(rank: int, workers: int, settings: RunSettings, progress: Progress) -> list[Progress]:
    saved: list[Progress] = []
    train_ranks(settings, fresh_strategy(settings), progress, rank, workers, saved.append, end=0)
    return saved


def run_many(rank: int, workers: int, settings: RunSettings) -> tuple[list[StepRecord], Progress]:
    return train_ranks(settings, fresh_strategy(settings), Progress(), rank, workers, lambda progress: None)


def fifty_steps(settings: RunSettings) -> RunSettings:
    return replace(settings, steps=50, optimizer=replace(settings.optimizer, learning_rate=3e-3, warmup=0.1))


def test_the_golden_losses(ranks: Ranks, settings: RunSettings) -> None:
    """Whatever changes them changes what training computes. `python -m tests.train.golden_losses` writes new ones."""
    ((records, _),) = ranks.run(1, run_many, fifty_steps(settings))
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 50
    assert golden[-1] < 0.3 * golden[0]
    assert [record.loss for record in records] == pytest.approx(golden, rel=1e-5)


def without_end(settings: RunSettings, **budget: float | None) -> RunSettings:
    return replace(settings, **({"steps": None} | budget))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_budget_of_tokens(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    rows = list(itertools.islice(rows_from(settings, Progress()), 20))
    sums = [sum(row.supervised for row in rows[: 5 * step]) for step in range(1, 5)]
    budget = sums[2] - 1  # the third step goes beyond it
    settings = without_end(settings, tokens=budget)
    for records, last in ranks.run(workers, run_many, settings):
        assert [record.step for record in records] == [1, 2, 3]
        assert last.tokens == sums[2]
        shares = [share / budget for share in (0, *sums)]
        factors = [rate_factor(*pair, settings.optimizer) for pair in itertools.pairwise(shares[:4])]
        assert [record.learning_rate for record in records] == pytest.approx([1e-2 * factor for factor in factors])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_budget_of_epochs(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    """Every row of two epochs, and none of the third; the last step is a short one."""
    rows = list(itertools.takewhile(lambda row: row.place[0] < 2, rows_from(settings, Progress())))
    settings = replace(without_end(settings, epochs=2), data=replace(settings.data, rows_per_step=5))
    assert len(rows) % 5
    for records, last in ranks.run(workers, run_many, settings):
        assert sum(record.tokens for record in records) == sum(row.supervised for row in rows)
        assert len(records) == len(rows) // 5 + 1
        assert last.place == rows[-1].place
        assert last.epochs == 2


def test_the_rate_falls_with_the_rows_of_an_epoch(ranks: Ranks, settings: RunSettings) -> None:
    """A whole step of it at a time, not a window: the first steps lie in one."""
    rows = list(itertools.takewhile(lambda row: row.place[0] < 1, rows_from(settings, Progress())))
    in_window = Counter(row.place[1] for row in rows)
    spent = [(window + (n + 1) / in_window[window]) / len(in_window) for _, window, n in (row.place for row in rows)]
    assert [row.epochs for row in rows] == pytest.approx(spent)
    optimizer = OptimizerSettings(learning_rate=1e-2, schedule="linear", warmup=0.0)
    settings = replace(without_end(settings, epochs=1), data=replace(settings.data, rows_per_step=2))
    for records, _ in ranks.run(2, run_many, replace(settings, optimizer=optimizer)):
        left = [1.0, *(1 - spent[at] for at in range(1, len(rows) - 1, 2))]
        assert [record.learning_rate for record in records] == pytest.approx([1e-2 * share for share in left])
        assert records[1].learning_rate > records[2].learning_rate > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_budget_of_time(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    """Every rank stops at the same step, though each has a clock of its own."""
    found = ranks.run(workers, run_many, without_end(settings, minutes=1e-9))
    assert [[record.step for record in records] for records, _ in found] == [[1]] * workers
    assert found[0][1].seconds == pytest.approx(found[0][0][0].seconds)


def evaluate_rank(
    rank: int, workers: int, settings: RunSettings, progress: Progress
) -> tuple[list[Evaluation], int, Progress, list[Progress]]:
    found: list[Evaluation] = []
    saved: list[Progress] = []
    strategy = fresh_strategy(settings)
    records, last = train_ranks(settings, strategy, progress, rank, workers, saved.append, on_evaluation=found.append)
    assert strategy.model.training
    return found, len(records), last, saved


def passes_of_rank(rank: int, workers: int, settings: RunSettings) -> int:
    """How often the loop says that it goes on."""
    passes = itertools.count()
    strategy = fresh_strategy(settings)
    train_ranks(
        settings, strategy, Progress(), rank, workers, lambda progress: None, alive=lambda: next(passes) and None
    )
    return next(passes)


def test_each_pass_of_an_evaluation_shows_that_the_rank_goes_on(ranks: Ranks, settings: RunSettings) -> None:
    """Else one that takes longer than a hang may would be taken for one."""
    settings = replace(settings, steps=1, evaluation=EvaluationSettings(settings.data.dataset))
    held_out = max(len(list(held_out_rows(settings).share(rank, 2))) for rank in range(2))
    assert held_out > 1
    assert ranks.run(2, passes_of_rank, settings) == [3 + held_out] * 2  # of five rows a rank has three at most


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_held_out_loss_is_that_of_a_plain_loop(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    """Before anything is learned: at a rate of 0."""
    settings = replace(
        settings,
        optimizer=OptimizerSettings(learning_rate=0.0),
        evaluation=EvaluationSettings(settings.data.dataset, every=4),
    )
    rows = list(held_out_rows(settings).share(0, 1))
    assert sum(len(row.keys) for row in rows) == 40
    model = fresh_model(settings).eval()
    with torch.no_grad():
        total = sum(model(**row.inputs, num_items_in_batch=1).loss.item() for row in rows)
    tokens = sum(row.supervised for row in rows)
    for found, _, last, saved in ranks.run(workers, evaluate_rank, settings, Progress()):
        assert [(one.step, one.tokens) for one in found] == [(4, tokens), (6, tokens)]
        assert [one.loss for one in found] == pytest.approx([total / tokens] * 2, rel=1e-5)
        assert last.best == min(one.loss for one in found)
        assert [one.worse for one in saved] == [0, 0, 1]


def evaluate_on(rank: int, workers: int, settings: RunSettings, kinds: tuple[type[Exception], ...]) -> str:
    """What an evaluation is ended with."""
    with pytest.raises(kinds) as raised:
        evaluate_rank(rank, workers, settings, Progress())
    return str(raised.value)


def test_held_out_samples_that_cannot_be_used_are_counted(
    ranks: Ranks, settings: RunSettings, tokenizer: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "which " * 400}, {"role": "assistant", "content": "three"}]
    long = [Sample(f"long-{n}", turns) for n in range(3)]
    processor = starting_point(settings)[1]
    for name, samples in (("some", [*map(random_sample, range(20)), *long]), ("all", long[:1])):
        write_dataset(tmp_path / name, processor, samples)
    some, none = (
        replace(settings, steps=1, evaluation=EvaluationSettings(str(tmp_path / name))) for name in ("some", "all")
    )
    (said,) = ranks.run(1, evaluate_on, some, (DataError,))
    assert re.match(r"[23] of \d+ samples of some could .*, --data.max-bad allows 0.1%: long-\d: too long", said)
    (said,) = ranks.run(1, evaluate_on, none, (SettingsError,))
    assert said.startswith(f"--evaluation.dataset {tmp_path}/all has no answer that could be used")


def test_patience_ends_a_run_that_no_longer_learns(ranks: Ranks, settings: RunSettings) -> None:
    """Also one that was stopped while it was losing patience."""
    still = OptimizerSettings(learning_rate=0.0)
    evaluation = EvaluationSettings(settings.data.dataset, every=1, patience=2)
    settings = replace(settings, optimizer=still, evaluation=evaluation)
    for found, steps, last, _ in ranks.run(2, evaluate_rank, settings, Progress()):
        assert (len(found), steps, last.step, last.worse) == (3, 3, 3, 2)
    later = replace(last, step=2, worse=1)
    for found, steps, last, _ in ranks.run(2, evaluate_rank, settings, later):
        assert (len(found), steps, last.step, last.worse) == (1, 1, 3, 2)
    assert ranks.run(1, evaluate_rank, settings, last) == [([], 0, last, [])]


def test_a_run_that_learns_keeps_its_patience(ranks: Ranks, settings: RunSettings) -> None:
    settings = replace(settings, evaluation=EvaluationSettings(settings.data.dataset, every=1, patience=1))
    ((found, steps, last, _),) = ranks.run(1, evaluate_rank, settings, Progress())
    assert steps == settings.steps
    assert last.best == found[-1].loss < 0.8 * found[0].loss
