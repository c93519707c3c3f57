"""Cases as lines, as a dated Markdown file, and as JSON beside it, written anew after each case."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Case = dict[str, Any]
"""`name`, `world_size`, `backend` and `device`, and figures by their names: seconds end in _s, shares are of 1."""

WANTED = {"fsdp2": 0.96}  # of one GPU's positions/s a GPU, at 8
REPLICAS = 0.9  # of the replicas' number


class Results:
    """`about` is what they were measured on. Cases of the same name replace each other; those that a file of the day
    in the folder holds stay, so that parts can be run one by one."""

    def __init__(self, folder: Path) -> None:
        self._stem = folder / f"{datetime.now(UTC):%F}-scale"
        self.about = {"commit": _commit(), "command": " ".join(["python", *sys.argv])}
        self._cases: dict[str, Case] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (before := self._stem.with_suffix(".json")).exists():
            self.join([before])

    def join(self, files: Iterable[Path]) -> None:
        for file in files:
            found = json.loads(file.read_text())
            self.about = found["about"] | self.about
            self._cases |= {case["name"]: case for case in found["cases"]}

    def add(self, case: Case) -> None:
        print(f"== {line(case)}", flush=True)
        self._cases[case["name"]] = case
        self.write()

    def write(self) -> None:
        cases = list(self._cases.values())
        content = {"about": self.about, "cases": cases}
        self._stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        self._stem.with_suffix(".md").write_text(markdown(self.about, cases))


def line(case: Case) -> str:
    shown = {name: value for name, value in case.items() if name != "name" and not isinstance(value, dict | list)}
    return f"{case['name']}: " + ", ".join(f"{name} {_value(value)}" for name, value in shown.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(about: dict[str, str], cases: list[Case]) -> str:
    lines = ["# Several GPUs", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += _weak([case for case in cases if case["part"] == "weak"])
    lines += _digests([case for case in cases if case["part"] in ("digest", "elastic")])
    lines += _serve([case for case in cases if case["part"] == "serve"])
    for case in cases:
        if case["part"] in ("kill", "elastic", "plan"):
            lines += [f"- {line(case)}"]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    both = [head, ["---"] * len(head), *([_value(cell) for cell in row] for row in rows)]
    return [*("| " + " | ".join(cells) + " |" for cells in both), ""]


def _weak(cases: list[Case]) -> list[str]:
    """Each strategy beside itself on one GPU."""
    if not cases:
        return []
    alone = {case["strategy"]: case for case in cases if case["world_size"] == 1}
    head = ["case", "positions/s a GPU", "of one GPU", "step, s", "more than one GPU's, s", "traced step, s"]
    head += ["communication", "exposed", "data wait", "checkpoint's stall, s", "GB"]
    rows = []
    for case in sorted(cases, key=lambda case: (case["strategy"], case["world_size"])):
        one = alone.get(case["strategy"])
        traced = case.get("communication") or {}
        rows.append(
            [
                case["name"],
                case["positions_per_s_per_gpu"],
                case["positions_per_s_per_gpu"] / one["positions_per_s_per_gpu"] if one else "",
                case["step_s"],
                case["step_s"] - one["step_s"] if one else "",
                *(traced.get(name, "") for name in ("step", "all", "exposed")),
                case["data_wait"],
                "" if case["checkpoint_stall_s"] is None else case["checkpoint_stall_s"],
                case["memory"] / 1e9,
            ]
        )
    at_8 = f"At least {WANTED['fsdp2']} of one GPU's rate a GPU is wanted of fsdp2 at 8."
    return ["Weak scaling, the same rows a GPU:", "", *_table(head, rows), at_8, ""]


def _digests(cases: list[Case]) -> list[str]:
    if not cases:
        return []
    rows = [[case["name"], case["world_size"], case["digest"][:16], case["as_expected"]] for case in cases]
    head = ["case", "workers", "digest", "a plain loop's"]
    return ["What the same steps trained on, from the tensors that the loops received:", "", *_table(head, rows)]


def _serve(cases: list[Case]) -> list[str]:
    if not cases:
        return []
    alone = {(case["streamed"], case["haproxy"]): case for case in cases if case["world_size"] == 1}
    head = [
        "case",
        "replicas",
        "tokens/s",
        "times one replica's",
        "requests/s",
        "prefix hits",
        "failed",
        "busiest client",
    ]
    rows = []
    for case in cases:
        one = alone.get((case["streamed"], case["haproxy"]))
        times = case["tokens_per_s"] / one["tokens_per_s"] if one else ""
        row = [case["name"], case["world_size"], case["tokens_per_s"], times, case["requests_per_s"]]
        rows.append([*row, case["prefix_hits"], case["failed"], case["client_busy"]])
    wanted = f"At least {8 * REPLICAS} times one replica's is wanted of 8."
    return ["The service, by OpenAI's client:", "", *_table(head, rows), wanted, ""]


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"
