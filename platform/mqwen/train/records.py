"""What a run has written down: a record for each step and for each evaluation."""

from __future__ import annotations

import json

from mqwen.storage import Location, retried

REPORT = "report.html"  # a page of the run's folder, written when it has come to its end


def read_metrics(run: Location, upto: int | None = None, last: int | None = None) -> list[dict]:
    """One record a step, in order: of all, or the `last` ones of those up to step `upto`, for which only the newest
    files are read. Where a step was trained twice, after a fault, the later record counts.
    """
    return _read(run / "metrics", upto, last)


def read_evaluations(run: Location) -> list[dict]:
    """One record an evaluation, in order."""
    return _read(run / "evaluations")


def _read(folder: Location, upto: int | None = None, last: int | None = None) -> list[dict]:
    records: dict[int, dict] = {}
    for name in reversed(retried(folder.names)):
        if last is not None and len(records) >= last:
            break
        for line in retried((folder / name).read_bytes).splitlines():
            record = json.loads(line)
            if upto is None or record["step"] <= upto:
                records.setdefault(record["step"], record)
    found = [records[step] for step in sorted(records)]
    return found if last is None else found[-last:]
