"""What a run has written down: a record for each step and for each evaluation."""

from __future__ import annotations

import json

from mqwen.storage import Location

REPORT = "report.html"  # a page of the run's folder, written when it has come to its end


def read_metrics(run: Location) -> list[dict]:
    """One record a step, in order. Where a step was trained twice, after a fault, the later record counts."""
    return _read(run / "metrics")


def read_evaluations(run: Location) -> list[dict]:
    """One record an evaluation, in order."""
    return _read(run / "evaluations")


def _read(folder: Location) -> list[dict]:
    records: dict[int, dict] = {}
    for name in folder.names():
        for line in (folder / name).read_bytes().splitlines():
            record = json.loads(line)
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]
