"""What a run says of itself through telemetry. Rank 0 alone calls this: the values are the same on all ranks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mqwen.telemetry import training
from mqwen.train.loop import Evaluation, StepRecord

if TYPE_CHECKING:
    from mqwen.train.metrics import Measured


def emit_step(run: str, record: StepRecord, measured: Measured) -> None:
    training.STEP.set(record.step, run=run)
    training.LAST_STEP_TIMESTAMP.set(measured.time, run=run)
    training.LOSS.set(record.loss, run=run)
    training.LEARNING_RATE.set(record.learning_rate, run=run)
    training.GRADIENT_NORM.set(record.gradient_norm, run=run)
    training.POSITIONS.add(record.positions, run=run)
    training.TOKENS.add(record.tokens, run=run)
    training.IMAGES.add(record.images, run=run)
    training.DATA_WAIT_SECONDS.add(record.data_wait, run=run)
    training.STEP_SECONDS.observe(record.seconds, run=run)
    training.MFU.set(measured.mfu, run=run)
    training.GOODPUT.set(measured.goodput, run=run)
    training.MEMORY_BYTES.set(measured.memory, run=run)


def emit_evaluation(run: str, evaluation: Evaluation) -> None:
    training.HELD_OUT_LOSS.set(evaluation.loss, run=run)


def emit_checkpoint(run: str, started: float) -> None:
    """`started` is when it was begun, by perf_counter; it has just been committed."""
    training.CHECKPOINT_SECONDS.observe(time.perf_counter() - started, run=run)
    training.LAST_CHECKPOINT_TIMESTAMP.set(time.time(), run=run)
