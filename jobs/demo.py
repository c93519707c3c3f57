"""The whole way on this machine: draw, ingest, train, export, serve, ask. `make demo` runs it.

python jobs/demo.py --out out/demo
"""

import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tyro

from mqwen import cli
from mqwen.cluster import cluster
from mqwen.data.errors import DataError
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.demo.quiz import ask, make_quiz, shuffle_pictures
from mqwen.demo.report import write_report
from mqwen.demo.serving import served
from mqwen.demo.stages import PeakMemory, Stages, counter
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import locate
from mqwen.train.report import draw_loss, read_metrics


@dataclass(frozen=True)
class Demo:
    """`pictures` are drawn for training, `asked` held-out ones for each kind of question, once in each language."""

    out: Path = Path("out/demo")
    pictures: int = 12000
    asked: int = 100
    steps: int = 800
    seed: int = 0


def main() -> None:
    demo = tyro.cli(Demo, description=__doc__)
    marker = demo.out / ".mqwen-demo"
    if demo.out.exists() and not marker.exists():
        raise DataError(f"--out {demo.out} exists and is not an earlier demo's folder; choose another")
    shutil.rmtree(demo.out, ignore_errors=True)
    demo.out.mkdir(parents=True)
    marker.touch()

    tokenizer, dataset, runs, artifact = (str(demo.out / name) for name in ("tokenizer", "data", "runs", "artifact"))
    python, jobs = sys.executable, Path(__file__).parent
    with PeakMemory() as memory, cluster(cpus=6) as address:
        stages = Stages({"RAY_ADDRESS": address})
        with stages.stage("vocabulary"):
            Path(tokenizer).mkdir()
            words = train_vocabulary(vocabulary_texts(), 512, Path(tokenizer) / VOCABULARY_FILE)
            stages.figures["vocabulary"] = f"{len(words)} tokens"
        with stages.stage("ingest"):
            stages.run(python, f"{jobs}/ingest.py", "digits", "--dataset", dataset, "--tokenizer", tokenizer,
                       "--pictures", str(demo.pictures), "--seed", str(demo.seed))
        with stages.stage("train"):
            stages.run(python, f"{jobs}/pretrain.py", "--recipe", "demo", "--runs", runs, "--tokenizer", tokenizer,
                       "--data.dataset", dataset, "--steps", str(demo.steps), "--seed", str(demo.seed))
        with stages.stage("export"):
            stages.run(python, f"{jobs}/export.py", "--run", f"{runs}/demo", "--to", artifact)
        with ExitStack() as serving:
            with stages.stage("serve"):
                server = serving.enter_context(served(stages, Path(artifact)))
            with stages.stage("ask"):
                quiz = ask(server, make_quiz(demo.asked, demo.seed), counter("answers"))
                shuffled = ask(server, shuffle_pictures(quiz, demo.seed), counter("answers with shuffled pictures"))
    loss = draw_loss(read_metrics(locate(runs) / "demo"))
    write_report(demo.out, stages, quiz, shuffled, memory.bytes, loss)


if __name__ == "__main__":
    cli.run(main)
