"""The loop: any number of workers computes what one process without sharding computes, step by step."""

import itertools

import pytest
import torch
from torch import nn

from mqwen.data.batch import Batch
from mqwen.train.loop import Progress, StepRecord
from mqwen.train.settings import RunSettings
from tests.train.conftest import Ranks
from tests.train.making import fresh_model, fresh_strategy, rows_from, train_ranks

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
        places = [Progress(2, rows[9].place), Progress(4, rows[19].place), Progress(5, rows[20].place)]
        assert saved == places
        assert last == places[-1]


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
