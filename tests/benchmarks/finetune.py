"""A LoRA fine-tune teaches the demo's model a task that it could not do, on pictures that training never saw.

python -m tests.benchmarks.finetune [--artifact out/demo/artifact]

The task: which digit is rightmost, in English and Chinese. The demo's model was asked which is leftmost, never this.
Without --artifact the demo's model is trained first. The adapter is loaded by PEFT beside ours and both must agree.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro
from peft import PeftModel

from mqwen.cluster import cluster
from mqwen.data.sources.digits import Language, Split, answer, draw, vocabulary_texts
from mqwen.model import MQWenLMHeadModel
from mqwen.model.adapters import attach_adapter
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.benchmarks.result import write_result

ROOT = Path(__file__).parents[2]
QUESTIONS = {"en": "Which digit is rightmost?", "zh": "最右边是哪个数字?"}


@dataclass(frozen=True)
class Finetune:
    """`steps` are those of the fine-tune, `pretrained` those of the demo's model, if there is none."""

    artifact: str | None = None
    pictures: int = 3000
    asked: int = 400
    steps: int = 200
    pretrained: int = 700


def write_conversations(folder: Path, split: Split, count: int, seed: int) -> None:
    """LLaVA's format: a picture of two or three digits, and one question about the rightmost."""
    (folder / "pictures").mkdir(parents=True)
    records = []
    random = np.random.default_rng(seed)
    for number in range(count):
        picture, digits = draw(split, random, int(random.integers(2, 4)))
        language: Language = random.choice(get_args(Language))
        (folder / "pictures" / f"{number}.jpg").write_bytes(picture)
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[language]}"},
            {"from": "gpt", "value": answer("leftmost", language, digits[::-1])},
        ]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(records))


def job(environment: dict[str, str], script: str, *words: object) -> str:
    command = [sys.executable, f"jobs/{script}.py", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"{script}: {done.stdout.splitlines()[-1]}", flush=True)
    return done.stdout


def largest_difference(artifact: Path, adapter: Path) -> float:
    """Of logits: PEFT's model with the adapter, and ours."""
    ids = torch.arange(40).view(2, 20)
    found = []
    for attach in (PeftModel.from_pretrained, attach_adapter):
        model = attach(MQWenLMHeadModel.from_pretrained(artifact), adapter).eval()
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits)
    return (found[0] - found[1]).abs().max().item()


def run(settings: Finetune, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    artifact = Path(settings.artifact or folder / "artifact")
    if not settings.artifact:
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        train_vocabulary(vocabulary_texts(), 512, tokenizer / VOCABULARY_FILE)
        places = ["--tokenizer", tokenizer, "--dataset", folder / "digits"]
        job(environment, "ingest", "digits", "--pictures", 12000, *places)
        places = ["--tokenizer", tokenizer, "--data.dataset", folder / "digits", "--runs", folder / "runs"]
        job(environment, "pretrain", "--recipe", "demo", "--steps", settings.pretrained, *places)
        job(environment, "export", "--run", folder / "runs" / "demo", "--to", artifact)
    splits: list[tuple[str, Split, int]] = [("new", "train", settings.pictures), ("asked", "heldout", settings.asked)]
    for seed, (name, split, count) in enumerate(splits):
        write_conversations(folder / name, split, count, seed)
        words = ["--conversations", folder / name / "conversations.json", "--pictures", folder / name / "pictures"]
        job(environment, "ingest", "llava", *words, "--dataset", folder / f"{name}-data", "--tokenizer", artifact)

    def evaluate(model: Path) -> dict[str, Any]:
        out = folder / f"scores-{model.name}"
        words = ["--artifact", model, "--dataset", folder / "asked-data", "--out", out, "--generation.max-tokens", 16]
        job(environment, "evaluate", *words)
        return json.loads((out / "report.json").read_text())["scores"]

    before = evaluate(artifact)
    places = ["--model.init-from", artifact, "--data.dataset", folder / "new-data", "--runs", folder / "runs"]
    held_out = ["--evaluation.dataset", folder / "asked-data", "--evaluation.every", 50, "--steps", settings.steps]
    job(environment, "finetune", "--recipe", "demo-lora", "--name", "tuned", *places, *held_out)
    for form in ("artifact", "adapter"):
        job(environment, "export", "--run", folder / "runs" / "tuned", "--to", folder / f"tuned-{form}", "--form", form)
    return {
        "exact match before": before["exact_match"],
        "exact match after": evaluate(folder / "tuned-artifact")["exact_match"],
        "questions": before["samples"],
        "largest difference of logits, PEFT's and ours": largest_difference(artifact, folder / "tuned-adapter"),
    }


def main() -> None:
    settings = tyro.cli(Finetune, description=__doc__)
    with tempfile.TemporaryDirectory() as folder, cluster(cpus=6, show_workers=False) as address:
        found = run(settings, Path(folder), {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT / "platform")})
    rows = [f"| {what} | {value:.4g} |" for what, value in found.items()]
    write_result("finetune", "\n".join(["| | |", "|---|---|", *rows]))
    assert found["exact match before"] < 0.5 < found["exact match after"]
    assert found["largest difference of logits, PEFT's and ours"] == 0


if __name__ == "__main__":
    main()
