"""The account of samples that could not be used: each is said, counted by reason, and held against a limit."""

from __future__ import annotations

import logging

from mqwen.data.batch import Batch
from mqwen.data.errors import TooManyBadError
from mqwen.telemetry import reading

logger = logging.getLogger(__name__)

SHOWN = 20  # samples in the error


class Quarantine:
    """Of one rank, of the rows of `dataset` from where it began to read them."""

    def __init__(self, dataset: str, max_bad: float) -> None:
        self._dataset, self._max_bad = dataset, max_bad
        self._seen, self._bad = 0, dict[str, str]()

    def add(self, row: Batch) -> None:
        """Raises TooManyBadError where more than `max_bad` of the samples so far could not be used. One always may; the
        share of a few rows says little.
        """
        self._seen += len(row.keys) + len(row.quarantined)
        self._bad |= row.quarantined
        for key, reason in row.quarantined.items():
            logger.warning("sample %s is left out: %s", key, reason)
            kind = reason.partition(":")[0]  # SampleError.reason
            reading.QUARANTINED_SAMPLES.add(dataset=self._dataset, reason=kind)
        if len(self._bad) > max(1, self._max_bad * self._seen):
            listed = "; ".join(f"{key}: {reason}" for key, reason in list(self._bad.items())[:SHOWN])
            raise TooManyBadError(
                f"{len(self._bad)} of {self._seen} samples of {self._dataset} could not be used, --data.max-bad allows "
                f"{self._max_bad:.1%}: {listed}"
            )
