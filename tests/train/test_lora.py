"""Fine-tuning an adapter: what is trained, by any number of workers, after a stop; and each form that it exports to."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mqwen.data.batch import Batch
from mqwen.errors import UserError
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.adapters import attach_adapter
from mqwen.storage import locate
from mqwen.train.build import build_model, outline, starting_point
from mqwen.train.export import export
from mqwen.train.loop import Progress
from mqwen.train.run import open_run
from mqwen.train.settings import LoraSettings, ModelSettings, RunSettings, SettingsError
from tests.train.conftest import Ranks
from tests.train.making import fresh_model, fresh_strategy, rows_from, tiny_settings, train_and_keep, train_ranks
from tests.train.test_checkpoint import resume, train_and_save

LORA = LoraSettings(r=4, alpha=16, dropout=0.3)


@pytest.fixture(scope="module")
def settings(tokenizer: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Of an adapter for an artifact of random weights."""
    fresh = tiny_settings(tokenizer, dataset, tmp_path_factory.mktemp("lora"))
    artifact = Path(fresh.runs) / "base"
    fresh_model(fresh).save_pretrained(artifact)
    starting_point(fresh)[1].save_pretrained(artifact)
    lora = replace(fresh, tokenizer="", model=ModelSettings(init_from=str(artifact), lora=LORA))
    rates = {"feature_proj.*": 3e-3}
    return replace(lora, optimizer=replace(fresh.optimizer, learning_rates=rates))


def row_with_pictures(settings: RunSettings) -> Batch:
    return next(row for row in rows_from(settings, Progress()) if row.images)


def logits(model: torch.nn.Module, row: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(**{name: row.inputs[name] for name in ("input_ids", "pixel_values", "segment_ids")}).logits


Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, float]]
"""Losses; weights at the end, and learning rates, by name."""


def train_lora(rank: int, workers: int, settings: RunSettings) -> Trained:
    strategy = fresh_strategy(settings)
    records, _ = train_ranks(settings, strategy, Progress(), rank, workers, lambda progress: None)
    weights = {name: tensor.full_tensor() for name, tensor in strategy.model.state_dict().items()}
    names = {parameter: name for name, parameter in strategy.model.named_parameters()}
    rates = {
        names[parameter]: group["base_lr"] for group in strategy.optimizer.param_groups for parameter in group["params"]
    }
    return [record.loss for record in records], weights, rates


@pytest.fixture(scope="module")
def alone(ranks: Ranks, settings: RunSettings) -> Trained:
    return ranks.run(1, train_lora, settings)[0]


def test_adapter_and_projector_learn_and_all_else_stays(settings: RunSettings, alone: Trained) -> None:
    losses, after, rates = alone
    before = build_model(settings, starting_point(settings)[0]).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learning = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == learning == rates.keys()
    assert len([name for name in learning if "lora_" in name]) == 2 * 3 * 2  # layers, targets, A and B
    assert {name for name, rate in rates.items() if rate == 3e-3} == {n for n in learning if "feature_proj" in n}
    assert {rates[name] for name in learning if "lora_" in name} == {settings.optimizer.learning_rate}
    assert losses[-1] < 0.9 * losses[0]


def test_any_number_of_workers_drops_out_the_same(ranks: Ranks, settings: RunSettings, alone: Trained) -> None:
    dropouts = {m.p for m in fresh_model(settings).transformer.modules() if isinstance(m, torch.nn.Dropout) and m.p}
    assert dropouts == {LORA.dropout}
    for losses, _, _ in ranks.run(3, train_lora, settings):
        assert losses == pytest.approx(alone[0], rel=1e-4)


def test_a_stopped_fine_tuning_goes_on_as_if_undisturbed(ranks: Ranks, settings: RunSettings, alone: Trained) -> None:
    ranks.run(1, train_and_save, replace(settings, name="stopped"), 4)
    ((_, _, rest, _),) = ranks.run(1, resume, replace(settings, name="stopped"))
    assert rest == alone[0][4:]


def test_an_adapter_starts_as_the_artifact(settings: RunSettings) -> None:
    row = row_with_pictures(settings)
    base = MQWenLMHeadModel.from_pretrained(settings.model.init_from).eval()
    one, other = (build_model(settings, base.config).eval() for _ in range(2))
    assert torch.equal(logits(one, row), logits(base, row))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def exported(ranks: Ranks, settings: RunSettings) -> Callable[[str], Path]:
    """A trained run's folder of a form."""
    with open_run(settings, *starting_point(settings)) as run:
        pass
    ranks.run(2, train_and_keep, settings)

    def of(form: str) -> Path:
        target = Path(settings.runs) / form
        if not target.exists():
            assert export(run, locate(target), form=form) == settings.steps  # type: ignore[arg-type]
        return target

    return of


def base_of(settings: RunSettings) -> MQWenLMHeadModel:
    return MQWenLMHeadModel.from_pretrained(settings.model.init_from).eval()


def test_peft_and_we_load_the_adapter_and_its_projector(exported: Callable[[str], Path], settings: RunSettings) -> None:
    row = row_with_pictures(settings)
    names = {path.name for path in exported("adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(base_of(settings), exported("adapter")).eval()
    assert torch.equal(logits(attach_adapter(base_of(settings), exported("adapter")), row), logits(theirs, row))
    assert not torch.allclose(logits(theirs, row), logits(base_of(settings), row), atol=0.1)
    assert str(settings.runs) not in (exported("adapter") / "adapter_config.json").read_text()


def test_the_artifact_is_base_and_adapter_merged(exported: Callable[[str], Path], settings: RunSettings) -> None:
    merged = MQWenLMHeadModel.from_pretrained(exported("artifact"))
    assert list(merged.state_dict()) == list(base_of(settings).state_dict())
    adapted = attach_adapter(base_of(settings), exported("adapter"))
    for row in itertools.islice(rows_from(settings, Progress()), 4):
        torch.testing.assert_close(logits(merged, row), logits(adapted, row), rtol=1e-5, atol=5e-5)


def test_transformers_serves_the_llava_form(exported: Callable[[str], Path]) -> None:
    ours = MQWenLMHeadModel.from_pretrained(exported("artifact"))
    theirs = LlavaForConditionalGeneration.from_pretrained(exported("llava")).eval()
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit"}]}]
    processor = AutoProcessor.from_pretrained(exported("llava"))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    asked = processor(text=text, images=[picture], return_tensors="pt")
    mine = MQWenProcessor.from_pretrained(exported("artifact"))
    ids = mine(messages=messages, images=[picture], return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(theirs(**asked).logits, ours(**ids).logits, rtol=0, atol=5e-5)


def test_a_run_without_an_adapter_exports_none(ranks: Ranks, settings: RunSettings) -> None:
    whole = replace(settings, name="whole", steps=2, model=replace(settings.model, lora=LoraSettings()))
    with open_run(whole, *starting_point(whole)) as run:
        pass
    ranks.run(1, train_and_keep, whole)
    with pytest.raises(SettingsError, match=rf"{run} trained no adapter.*--form artifact"):
        export(run, locate(Path(settings.runs) / "none"), form="adapter")
    assert not (Path(settings.runs) / "none").exists()
    export(run, locate(Path(settings.runs) / "whole-artifact"))
    tuned = MQWenLMHeadModel.from_pretrained(Path(settings.runs) / "whole-artifact").state_dict()
    assert not torch.equal(tuned["lm_head.weight"], base_of(settings).state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("lora", "optimizer", "words"),
    [
        ({"targets": ("c_atn", "w1")}, {}, ["target 'c_atn'", "c_attn, c_proj", "w1, w2"]),
        ({"modules_to_save": ("projector",)}, {}, ["module to save 'projector'", "feature_proj, lm_head"]),
        ({}, {"learning_rates": {"visual.*": 1e-4}}, ["--optimizer.learning-rates 'visual.*'", "frozen"]),
        ({}, {"freeze": ("nothing.*",)}, ["--optimizer.freeze 'nothing.*' matches no parameter"]),
    ],
)
def test_what_matches_nothing_is_refused_before_workers(
    settings: RunSettings, lora: dict, optimizer: dict, words: list[str]
) -> None:
    config = starting_point(settings)[0]
    outline(settings, config)
    changed = replace(
        settings,
        model=replace(settings.model, lora=replace(LORA, **lora)),
        optimizer=replace(settings.optimizer, **optimizer),
    )
    with pytest.raises(UserError) as raised:
        outline(changed, config)
    assert all(word in str(raised.value) for word in words), raised.value
