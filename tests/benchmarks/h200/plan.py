"""What jobs/plan.py would have said of the memory that the cases took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mqwen.model import MQWenConfig
from mqwen.train.estimate import Load, estimate
from mqwen.train.settings import ComputeSettings
from tests.benchmarks.h200.cases import Case, settings_of
from tests.benchmarks.h200.rows import Shape


def print_plans(results: Path, config: MQWenConfig) -> None:
    """Of a JSON file of results; what is not the project's training is left out."""
    for result in json.loads(results.read_text())["cases"]:
        known = result["settings"]
        if "shape" not in known:
            continue
        shape = Shape(**known["shape"])
        case = Case(**known | {"shape": shape, "compute": ComputeSettings(**known["compute"])})
        settings = settings_of(case, 1)
        settings = replace(settings, model=replace(settings.model, precision=result["dtype"]))
        pictures = shape.length // shape.picture_every
        answers = shape.supervised == "answers"
        load = Load(pictures, pictures if answers else 1, 0.15 if answers else 1.0)
        planned, measured = estimate(settings, config, load).bytes, result["memory"]
        of = f", {planned / measured:.3f} of the measured {measured / 1e9:.1f}" if measured else ""
        print(f"{case.name}: planned {planned / 1e9:.1f} GB{of}", flush=True)
