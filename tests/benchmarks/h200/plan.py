"""What jobs/plan.py would have said of the memory that the cases took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mqwen.model import MQWenConfig
from mqwen.train.estimate import Load, estimate
from mqwen.train.settings import ComputeSettings
from tests.benchmarks.h200.cases import Case, config_of, settings_of
from tests.benchmarks.h200.rows import Shape


def plans(results: Path, config: MQWenConfig) -> Iterator[tuple[str, float, int]]:
    """Name, bytes as planned and bytes as measured of each case in a JSON file of results, but of what is not the
    project's training or was measured without a GPU."""
    for result in json.loads(results.read_text())["cases"]:
        known, measured = result["settings"], result["memory"]
        if "shape" not in known or not measured:
            continue
        shape = Shape(**known["shape"])
        case = Case(**known | {"shape": shape, "compute": ComputeSettings(**known["compute"])})
        settings = settings_of(case, 1)
        settings = replace(settings, model=replace(settings.model, precision=result["dtype"]))
        pictures = shape.length // shape.picture_every
        answers = shape.supervised == "answers"
        load = Load(pictures, pictures if answers else 1, 0.15 if answers else 1.0)
        yield case.name, estimate(settings, config_of(case, config), load).bytes, measured


def print_plans(results: Path, config: MQWenConfig) -> None:
    for name, planned, measured in plans(results, config):
        share = planned / measured
        print(f"{name}: planned {planned / 1e9:.1f} GB, {share:.3f} of the measured {measured / 1e9:.1f}", flush=True)
