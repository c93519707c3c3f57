"""The benchmarks for one GPU and for several run from end to end, on a CPU and small."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from tests.benchmarks.h200.float8 import draw
from tests.benchmarks.h200.plan import plans
from tests.benchmarks.several.report import Results
from tests.benchmarks.several.trace import Communication, communication
from tests.benchmarks.train_h200 import TINY

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


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_the_benchmark_of_several_gpus_runs(tmp_path: Path) -> None:
    parts = ["plan", "fsdp2", "zero3", "digest", "kill", "serve", "elastic"]
    command = [sys.executable, "tests/benchmarks/scale.py", "--tiny", "--out", tmp_path, "--gpus", "2"]
    command += ["--minutes", "20", "--parts", *parts]
    environment = {"PYTHONPATH": "platform:.", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1400)
    cases = json.loads(next(tmp_path.glob("*-scale.json")).read_text())["cases"]
    found = {case["name"]: case for case in cases}
    assert all(case["world_size"] and case["backend"] and case["device"] for case in cases)
    for strategy in ("fsdp2", "zero3"):
        case = found[f"weak {strategy}-2"]
        assert case["positions_per_s_per_gpu"] > 0 and case["checkpoint_stall_s"] is not None
    assert found["digest digest-2"]["as_expected"] and found["elastic elastic-2"]["as_expected"]
    assert found["kill kill-2"]["kill_to_next_step_s"] > 0  # the bound is of GPUs: here others want the cores too
    assert found["elastic elastic-2"]["more_s"] > 0
    for name in ("serve 2", "serve 2 streamed"):
        assert found[name]["tokens_per_s"] > 0 and not found[name]["failed"]
        assert found[name]["prefix_hits"] > 0.2  # of three turns two have the one before in them
    assert_traffic(found["plan fsdp2 8"], 8)


def assert_traffic(plan: dict, workers: int) -> None:
    """Blocks are gathered for each pass, the rest once, in bfloat16; gradients are reduced in float32. Each weight is
    filled up to a multiple of the workers' number."""
    with torch.device("meta"):
        model = MQWenLMHeadModel(TINY)

    def padded(module: torch.nn.Module) -> int:
        return sum(-(-len(p) // workers) * workers * p[0].numel() for p in module.parameters())

    blocks = padded(model.transformer.h)
    rest = padded(model) - blocks
    trained = padded(model) - padded(model.visual)
    assert plan["gathered_GB"] == pytest.approx(2 * (2 * blocks + rest) / 1e9, rel=1e-6)
    assert plan["reduced_GB"] == pytest.approx(4 * trained / 1e9, rel=1e-6)
    assert plan["memory_GB"] == pytest.approx(plan["planned_GB"], rel=0.1)


def test_what_nothing_hides_of_communication(tmp_path: Path) -> None:
    """Microseconds 0 to 10 compute, 5 to 20 and 15 to 25 communicate, 18 to 22 compute, 40 to 50 too."""
    spans = [("mm", 0, 10), ("ncclDevKernel_AllGather", 5, 15), ("ncclDevKernel_ReduceScatter", 15, 10)]
    spans += [("add", 18, 4), ("mm", 40, 10)]
    events = [{"cat": "kernel", "name": name, "ts": at, "dur": took} for name, at, took in spans]
    file = tmp_path / "step.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": [*events, {"cat": "cpu_op", "name": "x"}]}).encode()))
    assert communication(file) == Communication(
        step=pytest.approx(50e-6), all=pytest.approx(20e-6), exposed=pytest.approx(11e-6)
    )
    file.write_bytes(gzip.compress(b'{"traceEvents": [{"cat": "cpu_op", "name": "x"}]}'))
    assert communication(file) is None


def test_results_that_were_measured_apart_stand_together(tmp_path: Path) -> None:
    first, second = Results(tmp_path / "a"), Results(tmp_path / "b")
    digest = {"part": "digest", "world_size": 1, "digest": "abc", "as_expected": True}
    first.add(digest | {"name": "one"})
    second.add(digest | {"name": "two"})
    second.add(digest | {"name": "one", "digest": "def"})
    both = Results(tmp_path / "a")  # on the same day
    both.join(tmp_path.glob("b/*.json"))
    both.write()
    cases = json.loads(next(tmp_path.glob("a/*.json")).read_text())["cases"]
    assert {case["name"]: case["digest"] for case in cases} == {"one": "def", "two": "abc"}
    assert "| two | 1 | abc | True |" in next(tmp_path.glob("a/*.md")).read_text()


def test_each_strategy_stands_beside_itself_on_one_gpu(tmp_path: Path) -> None:
    results = Results(tmp_path)
    same = {"part": "weak", "data_wait": 0.0, "checkpoint_stall_s": None, "memory": 10**9, "communication": None}
    for strategy, workers, rate, step in (("fsdp2", 1, 100.0, 1.0), ("fsdp2", 4, 97.0, 1.03), ("zero3", 4, 50.0, 2.0)):
        name = f"weak {strategy}-{workers}"
        case = {"name": name, "strategy": strategy, "world_size": workers, "positions_per_s_per_gpu": rate}
        results.add(same | case | {"step_s": step})
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| weak fsdp2-4 | 97 | 0.97 | 1.03 | 0.03 |" in text
    assert "| weak zero3-4 | 50 |  | 2 |  |" in text
