"""A run's folder: begun, continued, refused; and its metrics."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.storage import Location, locate
from mqwen.train.build import starting_point
from mqwen.train.checkpoint import COMMIT, step_folder
from mqwen.train.records import read_metrics
from mqwen.train.report import moving_mean, write_report
from mqwen.train.run import TrainingError, open_run
from mqwen.train.settings import CheckpointSettings, ParallelSettings, RunSettings, SettingsError

RECORD = {
    "seconds": 0.5,
    "images": 3,
    "positions": 100,
    "tokens": 10,
    "data_wait": 0.05,
    "learning_rates": {"": 1e-3, "visual.*": 1e-4},
    "gradient_norm": 1.0,
    "mfu": 0.25,
    "goodput": 0.9,
    "memory": 2**31,
}


def test_a_run_remembers_what_it_starts_from(settings: RunSettings) -> None:
    config, processor = starting_point(settings)
    with open_run(settings, config, processor) as opened:
        run = Path(opened.path)
    assert run == Path(settings.runs) / settings.name
    assert MQWenConfig.from_pretrained(run / "model").to_dict() == config.to_dict()
    assert MQWenProcessor.from_pretrained(run / "model").tokenizer.fingerprint == processor.tokenizer.fingerprint
    assert json.loads((run / "settings.json").read_text())["model"]["config"] == settings.model.config


def test_what_may_change_and_what_may_not(settings: RunSettings) -> None:
    start = starting_point(settings)
    with open_run(settings, *start) as run:
        pass
    free = replace(settings, parallel=ParallelSettings(workers=3), checkpoint=CheckpointSettings(every=7), log_every=1)
    with open_run(free, *start) as again:
        assert again == run
    assert json.loads((run / "settings.json").read_bytes())["parallel"]["workers"] == 3
    (step_folder(run, 5) / COMMIT).write_bytes(b"")
    for other, what in (
        (replace(settings, seed=1), "seed is 0, not 1"),
        (replace(settings, data=replace(settings.data, rows_per_step=4)), "data.rows-per-step is 5, not 4"),
        (
            replace(settings, optimizer=replace(settings.optimizer, learning_rates={"visual.*": 2.0})),
            r"optimizer.learning-rates.visual.\* is 0.001, not 2.0",
        ),
    ):
        refused = pytest.raises(
            SettingsError, match=rf"{run} exists with other settings \({what}\); give another --name"
        )
        with refused, open_run(other, *start):
            pass
    (step_folder(run, 5) / COMMIT).delete()
    with open_run(replace(settings, seed=1), *start):  # nothing was trained with the first ones
        pass
    assert json.loads((run / "settings.json").read_bytes())["seed"] == 1
    assert MQWenConfig.from_pretrained(Path(run.path) / "model").to_dict() == start[0].to_dict()


def test_of_a_step_trained_twice_the_later_record_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    for name, steps, loss in (("step-00000001", range(1, 5), 4.0), ("step-00000003", range(3, 7), 2.0)):
        record = RECORD | {"loss": loss}
        lines = [json.dumps({"step": step} | record) for step in steps]
        (tmp_path / "metrics" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found = read_metrics(locate(tmp_path))
    assert [(record["step"], record["loss"]) for record in found] == [(1, 4), (2, 4), (3, 2), (4, 2), (5, 2), (6, 2)]
    (tmp_path / "settings.json").write_text('{"name": "<b>"}')
    said = f"6 steps in 3 s, loss 4.000 to 2.000, 18 pictures, 200 positions/s; {tmp_path}/report.html"
    assert write_report(locate(tmp_path)) == said
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "evaluations").mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in ((2, 1.5), (4, 0.25), (6, 0.5))]
    (tmp_path / "evaluations" / "step-00000002.jsonl").write_text("".join(lines))
    assert "loss 4.000 to 2.000 (held out 0.500)" in write_report(locate(tmp_path))
    page = (tmp_path / "report.html").read_text()
    for what, value in (
        ("wait for data", "10.0% of the time in steps"),
        ("MFU", "25.0%"),
        ("most memory of rank 0", "2.00 GiB"),
        ("held-out loss, best", "0.2500 after step 4"),
    ):
        assert f"<tr><td>{what}<td>{value}" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_for_the_last_records_the_newest_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics").mkdir()
    for first in (1, 5, 9, 11):
        lines = [json.dumps({"step": step, "loss": first}) + "\n" for step in range(first, first + 4)]
        (tmp_path / "metrics" / f"step-{first:08d}.jsonl").write_text("".join(lines))
    read, asked = Location.read_bytes, list[str]()
    monkeypatch.setattr(Location, "read_bytes", lambda place: asked.append(str(int(place.name[5:13]))) or read(place))

    def found(**wanted: int) -> tuple[list[int], list[str]]:
        asked.clear()
        return [record["step"] for record in read_metrics(locate(tmp_path), **wanted)], list(asked)

    assert found(upto=8, last=3) == ([6, 7, 8], ["11", "9", "5"])
    assert found(last=2) == ([13, 14], ["11"])
    assert found(upto=12, last=9) == (list(range(4, 13)), ["11", "9", "5", "1"])
    assert [record["loss"] for record in read_metrics(locate(tmp_path), upto=12, last=3)] == [9, 11, 11]


def test_a_curve_has_the_means_of_the_last_steps() -> None:
    """One step without a number spoils none of them. At 20,000 steps no window is kept."""
    values = [3.0, math.nan, 5.0, 1.0, math.inf, math.inf, math.inf, 2.0]
    expected = [3.0, 3.0, 4.0, 3.0, 3.0, 1.0, math.nan, 2.0]
    assert moving_mean(values, 3).tolist() == pytest.approx(expected, nan_ok=True)
    many = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    found = moving_mean(many, 401)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert found[-1] == pytest.approx(many[-401:].mean())


def test_out_of_memory_names_what_to_change() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    said = str(TrainingError({0: raised.value, 1: raised.value}))
    assert said.startswith("training stopped, its checkpoints stay. rank 0, 1: out of memory (RuntimeError: ")
    for option in ("--data.packs-per-row", "--data.pack-length", "--parallel.workers", "--parallel.reshard-after"):
        assert option in said
    assert "out of memory" not in str(TrainingError({0: ValueError("something else")}))
