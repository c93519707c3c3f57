"""What a training needs on a cluster: a dataset in its bucket, and the command line that trains on it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mqwen.data.manifest import read_manifest
from mqwen.storage import locate
from tests.end_to_end.commands import SMALL
from tests.end_to_end.nodes import Cluster

PICTURES = 120
STEPS = 40
EVERY = 5  # steps between checkpoints
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
QUESTION = "Which colour is it?"


def draw(folder: Path, count: int) -> None:
    """LLaVA's conversations about pictures of one colour each."""
    records = []
    (folder / "pictures").mkdir()
    for number in range(count):
        name = list(COLOURS)[number % 3]
        shade = tuple(channel + number // 7**i % 7 for i, channel in enumerate(COLOURS[name]))  # each another one
        Image.new("RGB", (48, 48), shade).save(folder / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(records))


@dataclass
class Place:
    cluster: Cluster
    tokenizer: Path
    dataset: str
    runs: str

    def options(self, name: str, *more: object) -> list[str]:
        places = ["--data.dataset", self.dataset, "--runs", self.runs, "--name", name, "--tokenizer", self.tokenizer]
        sizes = ["--parallel.workers", 2, "--steps", STEPS, "--checkpoint.every", EVERY, "--log-every", 1]
        return ["jobs/pretrain.py", *SMALL, *map(str, [*places, *sizes, *more])]


def make_place(nodes: Cluster, tokenizer: Path, folder: Path) -> Place:
    """Draws the pictures in `folder` and ingests them."""
    draw(folder, PICTURES)
    dataset = f"{nodes.bucket}/data"
    words = ["--conversations", folder / "conversations.json", "--pictures", folder / "pictures"]
    words += ["--dataset", dataset, "--tokenizer", tokenizer, "--settings.shard-samples", 50]
    output = nodes.shell.done("jobs/ingest.py", "llava", *words)
    assert f"{dataset}: {PICTURES} samples" in output
    assert read_manifest(locate(dataset)).samples == PICTURES
    return Place(nodes, tokenizer, dataset, f"{nodes.bucket}/runs")


def losses(output: str) -> dict[int, str]:
    """The loss of each step, as printed; a step printed twice must have the same one."""
    found: dict[int, str] = {}
    for step, loss in re.findall(rf"step (\d+)/{STEPS} +loss (\S+)", output):
        assert found.setdefault(int(step), loss) == loss
    return found
