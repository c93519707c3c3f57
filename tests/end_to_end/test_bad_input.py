"""Bad command lines: one clear message, a non-zero exit, no trace, and no Ray was started for it."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import KEYS
from tests.end_to_end.commands import SMALL, Shell

EMPTY = {"shards": [], "tokenizer": "0" * 64, "rejected": {"picture": 3}, "format_version": 2}
SHARD = {"name": "shard-000000", "file": "shard-000000.tar", "samples": 1, "tokens": 9, "images": 0, "nbytes": 1}
SHARD |= {"sha256": "", "index_sha256": ""}

PRETRAIN = ["jobs/pretrain.py", *SMALL, "--runs", "{tmp}/runs"]
READY = [*PRETRAIN, "--tokenizer", "{tokenizer}", "--data.dataset"]

# Name: the command line, and what must be in the answer.
LINES: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (
        ["jobs/pretrain.py", "--recipe", "dmeo"],
        ["error: recipe 'dmeo' is unknown; did you mean 'demo'?"],
    ),
    "unknown option": ([*PRETRAIN, "--setps", "3"], ["--setps", "--steps"]),
    "missing dataset": ([*READY, "{tmp}/nowhere"], ["error: {tmp}/nowhere is no dataset: it has no manifest.json"]),
    "empty dataset": ([*READY, "{tmp}/empty"], ["error: {tmp}/empty holds no samples", "'picture': 3"]),
    "other tokenizer": ([*READY, "{tmp}/other"], ["error: {tmp}/other was ingested with another tokenizer"]),
    "missing tokenizer": (
        [*PRETRAIN, "--data.dataset", "{tmp}/other", "--tokenizer", "{tmp}/nowhere"],
        ["error: {tmp}/nowhere holds no qwen.tiktoken"],
    ),
    "fine-tuning of nothing": (
        ["jobs/finetune.py", "--recipe", "sft-lora", "--data.dataset", "{tmp}/other"],
        ["error: --model.init-from is missing"],
    ),
    "an adapter for fresh weights": (
        [*READY, "{tmp}/other", "--model.lora.r", "4"],
        ["error: --model.lora.r is 4: jobs/finetune.py trains adapters"],
    ),
    "a strategy with another's setting": (
        [*READY, "{tmp}/other", "--parallel.strategy", "zero2", "--parallel.shard", "2"],
        ["error: --parallel.shard is fsdp2's, zero2 has none: drop one of the two"],
    ),
    "a context shorter than a picture": (
        [*READY, "{tmp}/other", "--data.pack-length", "9"],
        ["error: --data.pack-length is 9, but one picture alone takes 9 positions"],
    ),
    "evaluation of a missing artifact": (
        ["jobs/evaluate.py", "--artifact", "{tmp}/nowhere", "--dataset", "{tmp}/other"],
        ["error: {tmp}/nowhere: is no folder"],
    ),
    "export of a missing run": (
        ["jobs/export.py", "--run", "{tmp}/nowhere", "--to", "{tmp}/artifact"],
        ["error: {tmp}/nowhere has no committed checkpoint"],
    ),
    "release by a missing config": (
        ["jobs/release.py", "roll-back", "--service.config", "{tmp}/nowhere.yaml"],
        ["error: --service.config {tmp}/nowhere.yaml cannot be read"],
    ),
    "ingest into a missing bucket": (
        ["jobs/ingest.py", "digits", "--pictures", "9", "--tokenizer", "{tokenizer}", "--dataset", "s3://nowhere/data"],
        ["error: s3://nowhere/data cannot be written: {moto} has no bucket 'nowhere'; make it, or name another"],
    ),
    "dataset in a missing bucket": (
        [*READY, "s3://nowhere/data"],
        ["error: s3://nowhere/data cannot be read: {moto} has no bucket 'nowhere'; make it, or name another"],
    ),
    "export to a missing bucket": (
        ["jobs/export.py", "--run", "{tmp}/nowhere", "--to", "s3://nowhere/artifact"],
        ["error: s3://nowhere/artifact cannot be written: {moto} has no bucket 'nowhere'; make it, or name another"],
    ),
    "a demo of one question": (["jobs/demo.py", "--asked", "1"], ["error: --asked is 1; at least 2 are needed"]),
    "demo over other files": (
        ["jobs/demo.py", "--out", "{tmp}/other"],
        ["error: --out {tmp}/other exists and is not an earlier demo's folder"],
    ),
}


@pytest.fixture(scope="module")
def places(tokenizer: Path, moto: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    for name, shards in (("empty", []), ("other", [SHARD])):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(json.dumps(EMPTY | {"shards": shards}))
    return {"tmp": str(folder), "tokenizer": str(tokenizer), "moto": moto}


@pytest.fixture(scope="module")
def answers(alone: Shell, places: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Exit code and output of each line."""
    shell = replace(alone, variables={"AWS_ENDPOINT_URL": places["moto"], **KEYS})
    lines = {name: [word.format_map(places) for word in words] for name, (words, _) in LINES.items()}
    with shell.start("tests/end_to_end/lines.py", stdin=subprocess.PIPE) as process:
        output, _ = process.communicate(json.dumps(lines), timeout=500)
    assert process.returncode == 0, output
    found: dict[str, tuple[int, str]] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_answered(answers: dict[str, tuple[int, str]], places: dict[str, str], name: str) -> None:
    code, output = answers[name]
    assert code == 2, output
    for words in LINES[name][1]:
        assert words.format_map(places) in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 12


def test_no_ray_was_started_and_nothing_written(answers: object, alone: Shell, places: dict[str, str]) -> None:
    assert list(alone.ray_folder.iterdir()) == []
    assert alone.processes() == []
    found = sorted(str(path.relative_to(places["tmp"])) for path in Path(places["tmp"]).rglob("*"))
    assert found == ["empty", "empty/manifest.json", "other", "other/manifest.json"]
