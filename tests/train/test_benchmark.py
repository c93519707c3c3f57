"""The benchmark for a GPU runs from end to end, on a CPU and small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mqwen.model import MQWenConfig
from tests.benchmarks.h200.float8 import draw
from tests.benchmarks.h200.plan import plans

ROOT = Path(__file__).parents[2]
CASES = ["sft-full 64 eager", "sft-full 64 checkpoint", "align 64 answers", "sft-lora-7b 64 answers float8"]


@pytest.mark.soak
def test_the_benchmark_of_training_runs(tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/train_h200.py", "--tiny", "--steps", "2", "--ray", "--out", tmp_path]
    command += ["--float8", "--float8-steps", "12"]
    environment = {"PYTHONPATH": "platform:.", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([*command, "--cases", *CASES], cwd=ROOT, env=environment, check=True, timeout=500)
    found = json.loads(next(tmp_path.glob("*-train_h200.json")).read_text())["cases"]
    assert [case["name"] for case in found] == [*CASES, "bare loop on the stream's rows", "the same under Ray"]
    assert all(case["positions_per_s"] > 0 for case in found)
    assert found[1]["checkpoint"]["stalls"]
    learnt = json.loads((tmp_path / "float8-learning.json").read_text())["losses"]
    assert all(len(losses) == 12 and losses[-1] < losses[0] for losses in learnt.values())
    assert learnt["float8"] != learnt["bfloat16"]
    assert draw(tmp_path / "float8-learning.json").stat().st_size > 1000


@pytest.mark.soak
def test_plans_are_what_was_measured_on_a_gpu() -> None:
    results = max((ROOT / "tests" / "benchmarks" / "results").glob("*-train_h200.json"))
    found = list(plans(results, MQWenConfig()))
    assert {name for name, *_ in found} >= {"sft-full 2048", "sft-full 2048 eager", "sft-full 2048 full", "align 2048"}
    for name, planned, measured in found:
        assert planned == pytest.approx(measured, rel=0.1), name
