"""Four steps of the reference's own trainer (golden c8), by our loop with sft-lora's settings."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mqwen.data.batch import Batch
from mqwen.train.build import build_model
from mqwen.train.loop import Data, Progress, StepRecord, Watch, train
from mqwen.train.recipes import sft_lora
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import make_strategy
from tests.model.golden import EOS, META, difference, names, tiny_model, whole
from tests.train.conftest import Ranks

RECORDED = META["c8_trainer"]
PREFIX = "LLM.base_model.model."


def rows() -> Iterator[Batch]:
    """The examples in the reference's order, a row each; it trains two a step."""
    pictures = whole("c8_trainer.images_raw")
    for place, index in enumerate(index for pair in RECORDED["order"] for index in pair):
        ids, answer = RECORDED["examples"][index]
        labels = [-100] * (len(ids) - answer) + ids[-answer:] + [EOS]
        inputs = {"input_ids": torch.tensor([[*ids, EOS]]), "labels": torch.tensor([labels])}
        yield Batch(
            inputs=inputs | {"pixel_values": pictures[[index]]},
            supervised=answer + 1,
            positions=len(ids),
            images=1,
            place=(0, 0, place),
            start=(0, 0, 0),
            epochs=0.0,
            keys=[],
            quarantined={},
        )


def settings_of(base: Path) -> RunSettings:
    """The recipe's, but for what the recording has smaller or faster."""
    recipe = sft_lora()
    lora = replace(recipe.model.lora, r=META["c7_lora"]["settings"]["r"])
    return replace(
        recipe,
        model=replace(recipe.model, init_from=str(base), lora=lora, precision="float32"),
        optimizer=replace(recipe.optimizer, learning_rate=1e-3, learning_rates={"feature_proj.*": 5e-3}),
        data=replace(recipe.data, rows_per_step=2),
        steps=4,
    )


def reproduce(rank: int, workers: int, settings: RunSettings) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
    model = build_model(settings, tiny_model().config).train()
    adapter = names("c7_lora.adapter.")
    assert len(adapter) == 18
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in adapter:  # base_model.model.X.lora_A.weight is X.lora_A.default.weight here
            own = name.removeprefix("c7_lora.adapter.base_model.model.").replace(".weight", ".default.weight")
            parameters[own].copy_(whole(name))
    strategy = make_strategy(model, list(model.transformer.h), settings)
    mine, records = list(rows())[rank::workers], list[StepRecord]()
    train(settings, strategy, Data(iter(mine), mine[0]), Progress(), Watch(records.append, lambda progress: None))
    return records, {name: tensor.full_tensor() for name, tensor in strategy.model.state_dict().items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_references_trainer(ranks: Ranks, tmp_path: Path, workers: int) -> None:
    """Tolerances: the log's four decimals of the loss 1e-4, the gradient's norm 1e-4 of itself, the weights 5e-5, where
    one step moves them by up to 5e-3."""
    tiny_model().save_pretrained(tmp_path)
    for records, after in ranks.run(workers, reproduce, settings_of(tmp_path)):
        log = RECORDED["log"][:4]
        assert [record.loss for record in records] == pytest.approx([one["loss"] for one in log], abs=1e-4)
        norms = [one["grad_norm"] for one in log]
        assert [record.gradient_norm for record in records] == pytest.approx(norms, rel=1e-4)
        # The log names the rate of the step to come.
        assert [record.learning_rates[""] for record in records[1:]] == [one["learning_rate"] for one in log[:3]]
        recorded = names("c8_trainer.after.")
        assert len(recorded) == 22
        for name in recorded:
            own = name.removeprefix("c8_trainer.after.")
            own = own.removeprefix(PREFIX).replace("feature_proj.", "feature_proj.modules_to_save.default.")
            assert difference(name, after[own]) <= 5e-5, name
