"""What a row costs, against torch's own count of what runs; what a plan says, against what a training took."""

import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.train.build import build_model, outline, starting_point
from mqwen.train.cost import Cost, cost_of
from mqwen.train.estimate import Load, PlannedRow, estimate, planned_row
from mqwen.train.hardware import ceiling, peak_memory
from mqwen.train.loop import LOSS_ONLY, Progress
from mqwen.train.recipes import recipe
from mqwen.train.settings import DataSettings, LoraSettings, ModelSettings, ParallelSettings, RunSettings, SettingsError
from mqwen.train.strategy import make_strategy
from tests.end_to_end.commands import ROOT
from tests.train.conftest import join_group
from tests.train.making import SIDE, rows_from


def whole(settings: RunSettings) -> RunSettings:
    return settings


def frozen_tower(settings: RunSettings) -> RunSettings:
    return replace(settings, optimizer=replace(settings.optimizer, freeze=("visual.*",), learning_rates={}))


def projector_alone(settings: RunSettings) -> RunSettings:
    freeze = ("visual.*", "transformer.*", "lm_head.*")
    return replace(settings, optimizer=replace(settings.optimizer, freeze=freeze, learning_rates={}))


def adapter(settings: RunSettings) -> RunSettings:
    rates = {"feature_proj.*": 1e-3}
    lora = replace(settings.model, lora=LoraSettings(r=4))
    return replace(settings, model=lora, optimizer=replace(settings.optimizer, learning_rates=rates))


@pytest.mark.parametrize("recipe", [whole, frozen_tower, projector_alone, adapter])
def test_a_row_costs_what_torch_counts(settings: RunSettings, recipe: Callable[[RunSettings], RunSettings]) -> None:
    """Attention by plain products, so that it is counted; of those, causal attention needs half."""
    settings = recipe(settings)
    config = starting_point(settings)[0]
    model = build_model(settings, config).train()
    cost = cost_of(model)
    row = planned_row(replace(settings.data, pack_length=96), config, Load(pictures=5, conversations=3, labelled=0.3))
    pictures = torch.zeros(row.images, 3, SIDE, SIDE, dtype=torch.uint8)
    in_place = {torch.ops.aten.addmm_: product}  # the head's gradient; torch counts only its sibling
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**row.inputs, pixel_values=pictures, **LOSS_ONLY).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    attention = counted.pop(torch.ops.aten.bmm)
    assert cost_without(cost, "square").of(row) == pytest.approx(sum(counted.values()) + seen(model, row), rel=1e-6)
    assert 2 * (cost.of(row) - cost_without(cost, "square").of(row)) == pytest.approx(
        attention - seen(model, row), 1e-6
    )


def product(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
    """Operations of total += a @ b, from their shapes."""
    return 2 * a[0] * a[1] * b[1]


def cost_without(cost: Cost, part: str) -> Cost:
    return replace(cost, **{part: 0.0})


def seen(model: MQWenLMHeadModel, row: PlannedRow) -> float:
    """What the tower's attention costs."""
    vision = model.config.vision_config
    passes = 1 + 2 * any(parameter.requires_grad for parameter in model.visual.parameters())
    pairs = row.images * (model.config.image_positions + 1) ** 2
    return 4.0 * vision.hidden_size * pairs * vision.num_hidden_layers * passes


def test_rows_of_all_kinds_are_counted(settings: RunSettings) -> None:
    """From segments and placeholders: the positions and their squares, conversation by conversation."""
    config = starting_point(settings)[0]
    cost = cost_of(outline(settings, config))
    assert config.image_positions == 4
    for row in itertools.islice(rows_from(settings, Progress()), 6):
        lengths = []
        for ids, segments in zip(row.inputs["input_ids"].tolist(), row.inputs["segment_ids"].tolist(), strict=True):
            for number in {*segments} - {0}:
                own = [one for one, segment in zip(ids, segments, strict=True) if segment == number]
                lengths.append(len(own) + 3 * own.count(config.image_token_id))
        assert sum(lengths) == row.positions
        squares = sum(length**2 for length in lengths)
        assert cost.of(row) == pytest.approx(cost.total(row.positions, row.supervised, row.images, squares))


CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "intermediate_size": 1408,
    "image_token_id": 5,
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
}


def planned(**parallel: Any) -> RunSettings:
    """A row of four thousand positions, so that activations weigh as much as the weights do."""
    data = DataSettings(dataset="any", pack_length=1024, packs_per_row=4, rows_per_step=1)
    return RunSettings(
        name="planned", model=ModelSettings(config=CONFIG), data=data, parallel=ParallelSettings(**parallel)
    )


LOAD = Load(pictures=8, conversations=4, labelled=0.2)


def measure(rank: int, settings: RunSettings, meeting: str, result: Any) -> None:
    """Bytes that two steps took at most, and seconds of the second."""
    join_group(rank, settings.parallel.workers, meeting)
    two_steps(settings, CONFIG | {"num_hidden_layers": 1}, packs=1)  # brings all the code that there is
    gc.collect()
    before = psutil.Process().memory_info().rss
    seconds = two_steps(settings, CONFIG, settings.data.packs_per_row)
    result.put((peak_memory(torch.device("cpu")) - before, seconds))
    dist.destroy_process_group()


def two_steps(settings: RunSettings, sizes: dict[str, Any], packs: int) -> float:
    """Seconds of the second."""
    config = MQWenConfig(**sizes)
    row = planned_row(replace(settings.data, packs_per_row=packs), config, LOAD)
    pictures = torch.zeros(row.images, 3, 64, 64, dtype=torch.uint8)
    model = build_model(settings, config).train()
    strategy = make_strategy(model, list(model.transformer.h), settings)
    for _ in range(2):
        started = time.perf_counter()
        loss = strategy.model(**row.inputs, pixel_values=pictures, num_items_in_batch=row.supervised, **LOSS_ONLY).loss
        strategy.backward(loss, last=True)
        strategy.step()
    return time.perf_counter() - started


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
def test_a_plan_is_what_a_training_takes(tmp_path: Any, workers: int) -> None:
    """On CPUs; processes of their own, as memory that was held once counts. A process holds more than its tensors: what
    the allocator keeps, and the libraries."""
    settings = planned(workers=workers)
    spawn = get_context("spawn")
    result = spawn.Queue()
    ranks = [spawn.Process(target=measure, args=(r, settings, tmp_path / "meeting", result)) for r in range(workers)]
    for rank in ranks:
        rank.start()
    measured = [result.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    found = estimate(settings, MQWenConfig(**CONFIG), LOAD)
    print(f"{workers}: {found.bytes / 2**20:.0f} MiB planned, {[f'{m / 2**20:.0f}' for m, _ in measured]} measured")
    for memory, _ in measured:
        assert found.bytes == pytest.approx(memory, rel=0.4)


def test_pictures_that_fit_no_conversation_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"2 pictures of 256 positions do not fit a conversation of 512"):
        planned_row(DataSettings(pack_length=512), MQWenConfig(), Load(pictures=2, conversations=1))


def run_plan(*words: str) -> tuple[int, str]:
    command = [sys.executable, ROOT / "jobs" / "plan.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "platform")})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    spec = spec_from_file_location("plan", ROOT / "jobs" / "plan.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules["plan"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_the_sizes_are_those_of_the_recipe_whatever_the_run_is_called(plan: ModuleType) -> None:
    named = replace(recipe("sft-full-7b"), name="first")
    assert plan.sizes("sft-full-7b", named).hidden_size == 4096
    assert plan.sizes("sft-full", replace(named, name="mine-7b")).hidden_size == 2048
    smaller = replace(named, model=replace(named.model, config={"num_hidden_layers": 2}))
    assert plan.sizes("sft-full-7b", smaller).num_hidden_layers == 2
    assert plan.sizes("sft-full-7b", smaller).hidden_size == 4096


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus is 0; 1 to"),
        (["--conversations", "0"], "--conversations is 0; 1 to"),
        (["--pictures", "-1"], "--pictures is -1; 0 to"),
        (["--reached", "0"], "--reached is 0.0; 0.001 to 1"),
        (["--labelled", "nan"], "--labelled is nan; 0 to 1"),
        (["--data.rows-per-step", "0"], "--data.rows-per-step is 0; at least 1"),
    ],
)
def test_plans_that_cannot_be_made(
    plan: ModuleType, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", "demo", *words])
    with pytest.raises(SettingsError, match=said):
        plan.main()


def test_a_plan_needs_no_dataset(
    plan: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", "demo", "--conversations", "2", "--pictures", "2"])
    plan.main()
    assert "demo on 1 H200, each" in capsys.readouterr().out


@pytest.mark.soak
def test_the_command() -> None:
    code, output = run_plan("--recipe", "sft-full", "--gpus", "2", "--kind", "L4")
    assert code == 2
    assert "sft-full on 2 L4, each" in output
    assert "2.15e9 weights" in output
    assert "error: it does not fit: take more --gpus" in output
    code, output = run_plan("--recipe", "sft-full", "--kind", "H2000")
    assert (code, output.count("\n")) == (2, 1)
    assert "--kind H2000 is unknown; known are B200, H200" in output


def test_a_device_without_datasheet_is_measured() -> None:
    found = ceiling(torch.device("cpu"), "float32")
    assert "float32 product of 1024³ measured on this cpu" in found.source
    assert 1e9 < found.flops < 1e14
