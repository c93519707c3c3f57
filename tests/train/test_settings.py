"""What can be wrong with settings, and what they mean for weights and learning rates."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

from mqwen.errors import UserError
from mqwen.model import MQWenConfig
from mqwen.train.build import build_model, outline, starting_point
from mqwen.train.command_line import overridden, read_settings
from mqwen.train.optimizer import freeze, parameter_groups, rate_factor
from mqwen.train.recipes import QWEN_7B, RECIPES, recipe
from mqwen.train.settings import LoraSettings, ModelSettings, OptimizerSettings, RunSettings, SettingsError
from tests.train.making import fresh_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0; at least 1 is needed"),
        ({"log_every": 0}, "--log-every is 0; at least 1"),
        ({"data": {"rows_per_step": 0}}, "--data.rows-per-step is 0; at least 1"),
        ({"data": {"packs_per_row": -1}}, "--data.packs-per-row is -1; at least 1"),
        ({"data": {"window_runs": 0}}, "--data.window-runs is 0; at least 1"),
        ({"data": {"run_samples": 0}}, "--data.run-samples is 0; at least 1"),
        ({"data": {"max_bad": math.nan}}, "--data.max-bad is nan; at least 0"),
        ({"optimizer": {"learning_rate": -1e-3}}, "--optimizer.learning-rate is -0.001; at least 0"),
        ({"optimizer": {"learning_rate": math.nan}}, "--optimizer.learning-rate is nan; at least 0"),
        ({"optimizer": {"learning_rates": {"visual.*": -1.0}}}, "--optimizer.learning-rates visual.* is -1.0"),
        ({"optimizer": {"weight_decay": -0.1}}, "--optimizer.weight-decay is -0.1; at least 0"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "--optimizer.betas are (0.9, 1.0); from 0 to below 1"),
        ({"optimizer": {"clip": math.nan}}, "--optimizer.clip is nan; above 0 is needed"),
        ({"minutes": math.nan}, "--minutes is nan; above 0 is needed"),
        ({"parallel": {"wait_for_resources": math.nan}}, "--parallel.wait-for-resources is nan; at least 0"),
        ({"data": {"dataset": ""}}, "--data.dataset is missing"),
        ({"data": {"mixture": {"a": 1.0}}}, "--data.dataset does not go with --data.mixture"),
        ({"data": {"dataset": "", "mixture": {"a": 0.0}}}, "--data.mixture gives a the weight 0.0; more than 0"),
        ({"data": {"dataset": "", "mixture": {"a": 1.0}}, "epochs": 2}, "--epochs does not go with --data.mixture"),
        ({"parallel": {"workers": 0}}, "--parallel.workers is 0; at least 1"),
        ({"checkpoint": {"every": 0}}, "--checkpoint.every is 0; at least 1"),
        ({"parallel": {"min_workers": 0}}, "--parallel.min-workers is 0; at least 1"),
        ({"parallel": {"min_workers": 3, "workers": 2}}, "--parallel.min-workers is 3; at most --parallel.workers 2"),
        ({"checkpoint": {"keep": 0}}, "--checkpoint.keep is 0; at least 1"),
        ({"model": {"init_from": "A"}}, "--tokenizer does not go with --model.init-from A"),
        (
            {"tokenizer": "", "model": {"init_from": "A"}},
            "--model.config (a recipe for fresh weights sets it) does not",
        ),
        ({"model": {"lora": LoraSettings(r=-1)}}, "--model.lora.r is -1; at least 0"),
        ({"model": {"lora": LoraSettings(alpha=0)}}, "--model.lora.alpha is 0; at least 1"),
        ({"model": {"lora": LoraSettings(dropout=1.0)}}, "--model.lora.dropout is 1.0; from 0 to below 1"),
        ({"name": "a/b"}, "--name 'a/b' must be a plain name"),
        ({"name": ""}, "--name '' must be a plain name"),
        ({"name": ".."}, "--name '..' must be a plain name"),
        ({"parallel": {"cpus_per_worker": 0}}, "--parallel.cpus-per-worker is 0; at least 1"),
        ({"parallel": {"strategy": "zero2", "shard": 2}}, "--parallel.shard is fsdp2's, zero2 has none"),
        ({"parallel": {"workers": 3, "shard": 2}}, "--parallel.shard 2 does not divide --parallel.workers 3"),
        ({"parallel": {"offload": "optimizer"}}, "is ZeRO's; fsdp2 has --parallel.offload weights"),
        (
            {"parallel": {"strategy": "zero1", "offload": "weights"}},
            "which zero1 does not: take --parallel.strategy zero3 or fsdp2, or --parallel.offload optimizer",
        ),
        ({"optimizer": {"warmup": 1.5}}, "--optimizer.warmup is 1.5; it is a share of the budget, from 0 to 1"),
        ({"optimizer": {"cooldown": -0.1}}, "--optimizer.cooldown is -0.1; it is a share"),
        ({"optimizer": {"clip": 0.0}}, "--optimizer.clip is 0.0; above 0 is needed"),
        ({"steps": None}, "the run has no end: set --steps, --tokens, --epochs or --minutes"),
        ({"minutes": 0.0}, "--minutes is 0.0; above 0 is needed"),
        ({"tokens": 0}, "--tokens is 0; at least 1 is needed"),
        ({"evaluation": {"patience": 2}}, "--evaluation.patience needs --evaluation.dataset"),
        ({"evaluation": {"every": 0}}, "--evaluation.every is 0; at least 1"),
        ({"compute": {"float8": True}}, "set --model.precision bfloat16 and --parallel.gpus-per-worker 1, or leave it"),
        (
            {
                "compute": {"float8": True},
                "model": {"precision": "bfloat16"},
                "parallel": {"strategy": "zero2", "gpus_per_worker": 1},
            },
            "--compute.float8 is fsdp2's, zero2 has none: set --parallel.strategy fsdp2",
        ),
        (
            {
                "compute": {"float8": True},
                "model": {"precision": "bfloat16"},
                "parallel": {"gpus_per_worker": 1},
                "data": {"pack_length": 500, "packs_per_row": 2},
            },
            "--data.pack-length 500 is none: take 512",
        ),
    ],
)
def test_settings_that_cannot_work(settings: RunSettings, change: dict[str, Any], message: str) -> None:
    settings.check()
    for name, value in change.items():
        changed = replace(getattr(settings, name), **value) if isinstance(value, dict) else value
        settings = replace(settings, **{name: changed})
    with pytest.raises(SettingsError) as raised:
        settings.check()
    assert message in str(raised.value)


def test_help_shows_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a recipe, too, which all else needs."""
    for words, rate in ((["--help"], "0.001"), (["-h", "--recipe", "sft-full"], "1e-05")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        with pytest.raises(SystemExit) as ended:
            read_settings("Train.")
        assert ended.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert all(f"--{option}" in shown for option in ("recipe", "data.dataset", "optimizer.learning-rate", "steps"))
        assert f"(default: {rate})" in shown
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--steps", "3"])
    with pytest.raises(SystemExit):
        read_settings("Train.")
    assert "the following arguments are required: --recipe" in capsys.readouterr().err


def test_a_dictionary_is_replaced_as_a_whole(capsys: pytest.CaptureFixture) -> None:
    demo = recipe("demo")
    words = ["--optimizer.learning-rates", "visual.*", "2e-4", "a", "1", "--model.config", '{"hidden_size": 64}']
    found = overridden(demo, [*words, "--data.mixture", "here", "3", "--seed", "5"])
    assert found.optimizer.learning_rates == {"visual.*": 2e-4, "a": 1.0}
    assert (found.model.config, found.data.mixture, found.seed) == ({"hidden_size": 64}, {"here": 3.0}, 5)
    assert overridden(demo, ["--optimizer.learning-rates"]).optimizer.learning_rates == {}
    assert overridden(demo, []) == demo
    for words, said in (
        (["--optimizer.learning-rates", "visual.*"], "take turns"),
        (["--optimizer.learning-rates", "visual.*", "fast"], "fast"),
        (["--model.config", "hidden_size"], "Expecting value"),
        (["--model.config", "[1]"], "it is no object"),
    ):
        with pytest.raises(SystemExit):
            overridden(demo, words)
        assert said in capsys.readouterr().err


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    for name in RECIPES:
        with pytest.raises(SettingsError, match=f"recipe '{name[1:]}' is unknown; did you mean '{name}'"):
            recipe(name[1:])
        assert recipe(name).name


def test_a_tokenizer_that_is_none(settings: RunSettings, dataset: Path) -> None:
    for tokenizer, message in (
        ("", "--tokenizer is missing"),
        (str(dataset), f"{dataset} holds no qwen.tiktoken"),
        ("org/repository", "org/repository holds no qwen.tiktoken"),  # nothing is fetched
    ):
        with pytest.raises(UserError, match=message):
            starting_point(replace(settings, tokenizer=tokenizer))


def test_an_artifact_to_start_from_that_is_none(settings: RunSettings, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=str(folder)):
            starting_point(replace(settings, model=ModelSettings(init_from=str(folder))))


class Two(nn.Module):
    """Parameters: body.0 and body.1, each a weight and a bias, and scale, of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.norm = nn.LayerNorm(2)


def groups_by_name(model: nn.Module, settings: OptimizerSettings) -> dict[str, tuple[float, float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["base_lr"], group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for parameter in group["params"]
    }


def test_rates_and_decay_of_each_parameter() -> None:
    rates = {"body.*": 2e-3, "*.bias": 3e-3, "body.1.bias": 4e-3}
    found = groups_by_name(Two(), OptimizerSettings(learning_rate=1e-3, learning_rates=rates, weight_decay=0.1))
    assert found == {
        "body.0.weight": (2e-3, 2e-3, 0.1),
        "body.1.weight": (2e-3, 2e-3, 0.1),
        "body.0.bias": (3e-3, 3e-3, 0.0),
        "body.1.bias": (4e-3, 4e-3, 0.0),  # the later pattern wins
        "norm.weight": (1e-3, 1e-3, 0.0),
        "norm.bias": (3e-3, 3e-3, 0.0),
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = Two()
    freeze(model, ("body.0.*", "norm.*"))
    assert groups_by_name(model, OptimizerSettings()).keys() == {"body.1.weight", "body.1.bias"}
    assert not model.body[0].weight.requires_grad


@pytest.mark.parametrize(
    ("frozen", "rates", "words"),
    [
        (("boddy.*",), {}, ["--optimizer.freeze 'boddy.*' matches no parameter", "body.*, norm.*"]),
        ((), {"bodi.*": 1.0}, ["--optimizer.learning-rates 'bodi.*' matches no parameter", "body.*, norm.*"]),
        (("body.*",), {"body.0.*": 1.0}, ["--optimizer.learning-rates 'body.0.*'", "frozen"]),
        (("body.*", "norm.*"), {}, ["--optimizer.freeze body.* norm.* leaves nothing to train"]),
    ],
)
def test_patterns_that_cannot_be_meant(frozen: tuple[str, ...], rates: dict[str, float], words: list[str]) -> None:
    model, settings = Two(), OptimizerSettings(freeze=frozen, learning_rates=rates)
    with pytest.raises(SettingsError) as raised:
        freeze(model, settings.freeze)
        parameter_groups(model, settings)
    assert all(word in str(raised.value) for word in words)


def test_the_demos_patterns_fit_the_model(settings: RunSettings) -> None:
    demo = recipe("demo").optimizer
    found = groups_by_name(fresh_model(settings), demo)
    assert found["visual.vision_model.encoder.layers.0.mlp.fc1.weight"][0] == demo.learning_rates["visual.*"]
    assert found["transformer.h.0.attn.c_attn.weight"][0] == demo.learning_rate


@pytest.mark.parametrize(
    ("name", "learning", "projector"),
    [("demo-lora", 2e-3, 1e-3), ("sft-lora", 3e-5, 1e-4), ("sft-full", 1e-5, 1e-4), ("align", 1e-3, 1e-3)],
)
def test_fine_tuning_recipes_leave_the_tower_as_it_is(
    settings: RunSettings, name: str, learning: float, projector: float
) -> None:
    tuning = recipe(name)
    model = build_model(
        replace(tuning, model=replace(settings.model, lora=tuning.model.lora)), starting_point(settings)[0]
    )
    rates = groups_by_name(model, tuning.optimizer)
    part = {"sft-full": "lm_head.weight", "align": "feature_proj.0.weight"}
    assert rates[part.get(name, "transformer.h.1.mlp.w2.lora_B.default.weight")][0] == learning
    assert {rate for part, (rate, _, _) in rates.items() if part.startswith("feature_proj")} == {projector}
    assert not [part for part in rates if part.startswith("visual")]
    if name == "align":
        assert {part.split(".")[0] for part in rates} == {"feature_proj"}
    if tuning.model.lora.r:
        assert not [part for part in rates if "lora_" not in part and "modules_to_save" not in part]


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "warmup", "factor"),
    [
        ("cosine", 0, 100, 0.1, 0.1),
        ("cosine", 4, 100, 0.1, 0.5),
        ("cosine", 9, 100, 0.1, 1.0),
        ("cosine", 10, 100, 0.1, 1.0),
        ("cosine", 55, 100, 0.1, 0.5),
        ("cosine", 25, 100, 0.1, (1 + math.sqrt(3) / 2) / 2),  # a sixth of the way down: cos 30°
        ("cosine", 99, 100, 0.1, 0.000304586490452),
        ("cosine", 0, 100, 0.0, 1.0),
        ("cosine", 0, 1, 0.5, 1.0),
        ("cosine", 1, 2, 1.0, 1.0),
        ("linear", 4, 100, 0.1, 0.5),
        ("linear", 10, 100, 0.1, 1.0),
        ("linear", 55, 100, 0.1, 0.5),
        ("linear", 3, 4, 0.0, 0.25),
        ("wsd", 4, 100, 0.1, 0.5),
        ("wsd", 10, 100, 0.1, 1.0),
        ("wsd", 75, 100, 0.1, 1.0),  # the last quarter falls
        ("wsd", 80, 100, 0.1, 0.8),
        ("wsd", 99, 100, 0.1, 0.04),
    ],
)
def test_the_schedule(schedule: Literal["cosine"], step: int, steps: int, warmup: float, factor: float) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup=warmup, cooldown=0.25)
    assert rate_factor(step / steps, (step + 1) / steps, settings) == pytest.approx(factor, rel=1e-9)


def test_a_stable_rate_needs_no_end() -> None:
    assert rate_factor(0.99, 1.0, OptimizerSettings(schedule="wsd", cooldown=0.0)) == 1.0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_run(name: str) -> None:
    """With a dataset, and a place to start from where it makes no fresh weights."""
    found = recipe(name)
    fresh = name.startswith(("demo", "pretrain")) and name != "demo-lora"
    start = {} if fresh else {"init_from": "artifact"}
    replace(found, model=replace(found.model, **start), data=replace(found.data, dataset="data")).check()
    sizes = QWEN_7B if name.endswith("-7b") else recipe("demo").model.config if "demo" in name else {}
    outline(found, MQWenConfig(**sizes))


def test_a_context_that_holds_no_picture_is_refused(settings: RunSettings) -> None:
    config = starting_point(settings)[0]
    short = replace(settings, data=replace(settings.data, pack_length=config.image_positions))
    with pytest.raises(SettingsError, match=r"--data.pack-length is 4, but one picture alone takes 4 .* 32"):
        outline(short, config)
