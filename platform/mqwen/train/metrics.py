"""What a run says of itself: a line on the console, Ray's metrics, and files of the run, TensorBoard's among them."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mqwen.train.emit import emit_evaluation, emit_step
from mqwen.train.hardware import Ceiling, peak_memory
from mqwen.train.loop import Evaluation, StepRecord
from mqwen.train.settings import RunSettings

BAR = 12  # characters


@dataclass(frozen=True)
class Measured:
    """What rank 0 adds to a step's record.

    `mfu` is the share of all workers' ceiling that was used (model FLOPs utilization); `memory` the most bytes held so
    far; `goodput` the share of the time since the job's start that went into steps that count; `time` is Unix time.
    """

    mfu: float
    memory: int
    goodput: float
    time: float


class Metrics:
    """Of rank 0. The files are those of the steps since they were taken last: taken with a checkpoint they are those of
    the steps that count, whatever was lost on the way.

    `started` is when the job did; `productive` are the seconds of its steps that are already in a checkpoint.
    """

    def __init__(
        self,
        settings: RunSettings,
        device: torch.device,
        peak: Ceiling,
        workers: int,
        started: float,
        productive: float,
    ) -> None:
        self._settings, self._device, self._workers = settings, device, workers
        self._peak, self._started, self._productive = peak, started, productive
        self._lines: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._recent: list[StepRecord] = []
        self._spent: float | None = None  # of the budget, when a line was printed last
        self.last: dict[str, Any] = {}

    def step(self, record: StepRecord) -> None:
        self._productive += record.seconds
        now = time.time()
        measured = Measured(
            mfu=record.flops / record.seconds / (self._workers * self._peak.flops),
            memory=peak_memory(self._device),
            goodput=self._productive / max(now - self._started, self._productive),
            time=now,
        )
        self.last = asdict(record) | asdict(measured)
        self._lines.append(self.last)
        self._recent.append(record)
        emit_step(self._settings.name, record, measured)
        if record.step % self._settings.log_every == 0 or record.step == 1 or record.spent >= 1:
            print(self._line(measured), flush=True)
            self._recent, self._spent = [], record.spent

    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluations.append(asdict(evaluation))
        emit_evaluation(self._settings.name, evaluation)
        print(
            f"step {evaluation.step}: held-out loss {evaluation.loss:.6f} over {evaluation.tokens:,} tokens, "
            f"in {evaluation.seconds:.1f} s",
            flush=True,
        )

    @property
    def loss(self) -> float:
        """The mean of the steps since the files were taken last, but for those whose loss is no number."""
        return statistics.fmean([one["loss"] for one in self._lines if math.isfinite(one["loss"])] or [math.inf])

    def take(self) -> dict[str, bytes]:
        """The files, by their names in the run's folder; from now on others are kept."""
        files = {}
        if self._lines:
            name = f"step-{self._lines[0]['step']:08d}"
            files[f"metrics/{name}.jsonl"] = _json_lines(self._lines)
            files[f"tensorboard/events.out.tfevents.{name}"] = self._events()
        if self._evaluations:
            files[f"evaluations/step-{self._evaluations[0]['step']:08d}.jsonl"] = _json_lines(self._evaluations)
        self._lines, self._evaluations = [], []
        return files

    def _line(self, measured: Measured) -> str:
        records, last = self._recent, self._recent[-1]
        seconds = sum(r.seconds for r in records)
        steps = f"/{self._settings.steps}" if self._settings.steps else ""
        before = last.spent * (1 - 1 / last.step) if self._spent is None else self._spent
        pace = (last.spent - before) / seconds
        rates = "".join(f", {pattern} {rate:.2e}" for pattern, rate in last.learning_rates.items() if pattern)
        return (
            f"step {last.step}{steps}  loss {last.loss:.6f}  lr {last.learning_rates.get('', last.learning_rate):.2e}"
            f"{rates}  norm {last.gradient_norm:.3f}  {sum(r.positions for r in records) / seconds:,.0f} positions/s  "
            f"{sum(r.tokens for r in records) / seconds:,.0f} tokens/s  "
            f"{sum(r.images for r in records) / seconds:,.0f} images/s  MFU {measured.mfu:.1%}  "
            f"data wait {sum(r.data_wait for r in records) / seconds:.1%}  {measured.memory / 2**30:.1f} GiB  "
            f"goodput {measured.goodput:.0%}  {_bar(last.spent)} {_clock((1 - last.spent) / pace if pace else 0)} left"
        )

    def _events(self) -> bytes:
        """The lines and evaluations as TensorBoard reads them."""
        from tensorboardX import SummaryWriter  # takes a second

        with tempfile.TemporaryDirectory() as local:
            with SummaryWriter(local) as writer:
                for line in self._lines:
                    for name, value in _flat(line).items():
                        if name not in ("step", "place", "time"):
                            writer.add_scalar(f"train/{name}", value, line["step"], walltime=line["time"])
                for evaluation in self._evaluations:
                    writer.add_scalar("held_out/loss", evaluation["loss"], evaluation["step"])
            (file,) = Path(local).iterdir()
            return file.read_bytes()


def _json_lines(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _flat(line: dict[str, Any]) -> dict[str, float]:
    rates = {f"learning_rates/{pattern or 'others'}": rate for pattern, rate in line["learning_rates"].items()}
    rates = {re.sub(r"[^-/\w.]", "_", name): rate for name, rate in rates.items()}  # TensorBoard takes no stars
    return {name: value for name, value in line.items() if name != "learning_rates"} | rates


def _bar(share: float) -> str:
    full = min(BAR, int(BAR * share))
    return f"[{'#' * full}{'-' * (BAR - full)}] {min(share, 1):.0%}"


def _clock(seconds: float) -> str:
    left = max(0, round(seconds))
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
