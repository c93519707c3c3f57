"""What a run says: its lines, its files, TensorBoard's events, its traces."""

import gzip
import json
import math
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from mqwen.storage import locate
from mqwen.train.hardware import Ceiling
from mqwen.train.loop import Evaluation, StepRecord
from mqwen.train.metrics import Metrics
from mqwen.train.profile import StepProfiler
from mqwen.train.settings import RunSettings

CPU = torch.device("cpu")
RECORD = StepRecord(
    step=1,
    place=(0, 1, 2),
    loss=2.5,
    learning_rate=1e-2,
    learning_rates={"": 1e-2, "visual.*": 1e-3},
    gradient_norm=1.25,
    tokens=30,
    positions=200,
    images=4,
    flops=1e9,
    seconds=0.5,
    data_wait=0.1,
    spent=0.25,
)


@pytest.fixture
def metrics(settings: RunSettings) -> Metrics:
    """Two workers of 4e9 operations a second; the job began four seconds ago."""
    return Metrics(replace(settings, steps=4, log_every=2), CPU, Ceiling(4e9, "a test"), 2, time.time() - 4, 0.0)


def test_the_lines(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        metrics.step(replace(RECORD, step=step, spent=step / 4))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/4  loss 2.500000  lr 1.00e-02, visual.* 1.00e-03  norm 1.250  400 positions/s  ")
    assert "  60 tokens/s  8 images/s  MFU 25.0%  data wait 20.0%  " in first
    assert first.endswith("[###---------] 25% 0:00:02 left")
    assert second.startswith("step 2/4  loss")
    assert "[######------] 50% 0:00:01 left" in second
    metrics.evaluation(Evaluation(3, 0.75, 1234, 2.0))
    assert capsys.readouterr().out == "step 3: held-out loss 0.750000 over 1,234 tokens, in 2.0 s\n"


def test_goodput_counts_what_was_in_a_checkpoint_already(settings: RunSettings) -> None:
    metrics = Metrics(settings, CPU, Ceiling(1.0, ""), 1, time.time() - 100, productive=49.5)
    metrics.step(RECORD)
    assert metrics.last["goodput"] == pytest.approx(0.5, rel=0.02)
    assert metrics.last["memory"] > 10_000_000


def events(data: bytes) -> list[Event]:
    """A file of TFRecords: length, its checksum, as many bytes, their checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_the_files_are_those_since_the_last(metrics: Metrics) -> None:
    metrics.step(RECORD)
    metrics.step(replace(RECORD, step=2, loss=1.5))
    metrics.evaluation(Evaluation(2, 0.75, 10, 0.1))
    files = metrics.take()
    assert files.keys() == {
        "metrics/step-00000001.jsonl",
        "evaluations/step-00000002.jsonl",
        "tensorboard/events.out.tfevents.step-00000001",
    }
    lines = [json.loads(line) for line in files["metrics/step-00000001.jsonl"].splitlines()]
    assert [(line["step"], line["loss"], line["mfu"]) for line in lines] == [(1, 2.5, 0.25), (2, 1.5, 0.25)]
    shown = {
        (value.tag, event.step): value.simple_value
        for event in events(files["tensorboard/events.out.tfevents.step-00000001"])
        for value in event.summary.value
    }
    assert shown["train/loss", 2] == 1.5
    assert shown["train/learning_rates/visual._", 1] == pytest.approx(1e-3)
    assert shown["held_out/loss", 2] == 0.75
    assert all(math.isfinite(value) for value in shown.values())

    assert metrics.take() == {}
    metrics.step(replace(RECORD, step=3))
    assert metrics.take().keys() == {"metrics/step-00000003.jsonl", "tensorboard/events.out.tfevents.step-00000003"}


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    profiler = StepProfiler(locate(tmp_path), (1,), done=0)
    profiler.step()
    assert f"warning: a trace is lost: {tmp_path}/profile/step-00000001.trace.json.gz" in capsys.readouterr().out


def test_chosen_steps_are_traced(tmp_path: Path) -> None:
    """Steps 3, 5 and 6 of a run that goes on after its second."""
    profiler = StepProfiler(locate(tmp_path), (3, 5, 6), done=2)
    for step in range(3, 9):
        with torch.profiler.record_function(f"work of {step}"):
            torch.ones(100, 100) @ torch.ones(100, 100)
        profiler.step()
    found = {path.name for path in (tmp_path / "profile").iterdir()}
    assert found == {f"step-0000000{step}.{kind}" for step in (3, 6) for kind in ("trace.json.gz", "memory.txt")}
    for last, steps in ((3, {3}), (6, {5, 6})):
        trace = json.loads(gzip.decompress((tmp_path / "profile" / f"step-0000000{last}.trace.json.gz").read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {step for step in range(3, 9) if f"work of {step}" in names} == steps
        assert "aten::mm" in names
        assert "aten::mm" in (tmp_path / "profile" / f"step-0000000{last}.memory.txt").read_text()
