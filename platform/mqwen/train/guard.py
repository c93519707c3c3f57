"""Steps that would harm the weights are left out: a loss or a gradient that is no number, or far above those before.

RUN/left-out/step-00000123.json    why, and the keys of the samples
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from mqwen.errors import LastingError
from mqwen.storage import Location, StorageError
from mqwen.telemetry import training
from mqwen.train.settings import GuardSettings

FOLDER = "left-out"
RECENT = 100  # steps whose median is the measure of a spike
FEWEST = 20  # before which none is seen: a fresh model's first steps are wild
SHOWN = 20  # keys in the error


class DivergedError(LastingError):
    """Too many steps were left out; the message has the last one's reason and sample keys."""


@dataclass(frozen=True)
class Seen:
    """A step's loss and gradient norm, and whether it was left out."""

    loss: float
    norm: float
    left_out: bool


class Guard:
    """Every rank makes one and calls it equally often. `clip` is the largest norm that changes the weights as it is;
    `before` are the losses and norms of the last steps, if any."""

    def __init__(
        self, settings: GuardSettings, clip: float, run: Location, before: Iterable[tuple[float, float]] = ()
    ) -> None:
        self._settings, self._clip, self._run = settings, clip, run
        self._recent = deque[Seen](maxlen=RECENT)
        for loss, norm in before:
            self._recent.append(Seen(loss, norm, self._reason(loss, norm) is not None))

    def accepts(self, step: int, loss: float, keys: Callable[[], list[str]], norm: float) -> bool:
        """Whether the step's update is to be made. `keys` are those of this rank's samples.

        Raises DivergedError where more than `guard.most` of the last RECENT steps were left out.
        """
        reason = self._reason(loss, norm)
        self._recent.append(Seen(loss, norm, reason is not None))
        if reason is None:
            return True
        shares: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, keys())
        found = [key for share in shares for key in share]
        if dist.get_rank() == 0:
            training.LEFT_OUT_STEPS.add(run=self._run.name)
            print(f"step {step} is left out: {reason}; its samples are in {self._file(step)}", flush=True)
            record = {"step": step, "reason": reason, "loss": str(loss), "gradient_norm": str(norm), "keys": found}
            with suppress(StorageError):  # it is printed, too
                self._file(step).write_bytes(json.dumps(record, indent=1).encode())
        count = sum(seen.left_out for seen in self._recent)
        if count > self._settings.most:
            raise DivergedError(
                f"{count} of the last {len(self._recent)} steps were left out, --guard.most allows "
                f"{self._settings.most}; step {step}: {reason}. Lower --optimizer.learning-rate, or look at the "
                f"samples {', '.join(found[:SHOWN])}"
            )
        return False

    def _file(self, step: int) -> Location:
        return self._run / FOLDER / f"step-{step:08d}.json"

    def _reason(self, loss: float, norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        good = [seen for seen in self._recent if not seen.left_out]
        # A model that has learned nearly all has losses near nothing, of which the next hard sample's is many times.
        if not self._settings.spike or len(good) < FEWEST or norm <= self._clip:
            return None
        medians = {
            "loss": (loss, statistics.median(seen.loss for seen in good)),
            "gradient norm": (norm, statistics.median(seen.norm for seen in good)),
        }
        for name, (value, usual) in medians.items():
            if value > self._settings.spike * usual:
                return f"its {name} is {value:.4g}, {value / usual:.1f} times the usual {usual:.4g}"
        return None
