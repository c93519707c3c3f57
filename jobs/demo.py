"""The whole way on this machine: draw, ingest, train, export, serve, ask. `make demo` runs it.

python jobs/demo.py --out out/demo [--storage s3]
"""

import shutil
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
from mqwen.demo.stages import PeakMemory, Stages
from mqwen.demo.storage import Storage, stored
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import locate
from mqwen.train.records import read_metrics
from mqwen.train.report import draw_loss


@dataclass(frozen=True)
class Demo:
    """`pictures` are drawn for training, `asked` held-out ones for each kind of question, once in each language.

    `storage` says where dataset, run and artifact lie: in `out`, or in a bucket of a server that ends with the demo.
    """

    out: Path = Path("out/demo")
    storage: Storage = "folder"
    pictures: int = 12000
    asked: int = 100
    steps: int = 700
    seed: int = 0


def main() -> None:
    demo = tyro.cli(Demo, description=__doc__)
    if demo.asked < 2:
        raise DataError(f"--asked is {demo.asked}; at least 2 are needed, whose pictures can be exchanged")
    marker = demo.out / ".mqwen-demo"
    if demo.out.exists() and not marker.exists():
        raise DataError(f"--out {demo.out} exists and is not an earlier demo's folder; choose another")
    shutil.rmtree(demo.out, ignore_errors=True)
    demo.out.mkdir(parents=True)
    marker.touch()

    tokenizer = demo.out / "tokenizer"
    with PeakMemory() as memory, stored(demo.storage, demo.out) as place, cluster(6, show_workers=False) as address:
        dataset, runs, artifact = (f"{place}/{name}" for name in ("data", "runs", "artifact"))
        stages = Stages(Path(__file__).parent, {"RAY_ADDRESS": address})
        with stages.stage("vocabulary") as figure:
            tokenizer.mkdir()
            figure(f"{len(train_vocabulary(vocabulary_texts(), 512, tokenizer / VOCABULARY_FILE))} byte sequences")
        where, seed = {"tokenizer": tokenizer}, {"seed": demo.seed}
        stages.job("ingest", "ingest.py", "digits", dataset=dataset, pictures=demo.pictures, **where, **seed)
        stages.job(
            "train", "pretrain.py", recipe="demo", runs=runs, data__dataset=dataset, steps=demo.steps, **where, **seed
        )
        stages.job("export", "export.py", run=f"{runs}/demo", to=artifact)
        with ExitStack() as serving:
            with stages.stage("serve"):
                server = serving.enter_context(served(stages, locate(artifact), demo.out))
            with stages.stage("ask") as figure:
                quiz = ask(server, make_quiz(demo.asked, demo.seed), cli.counter("answers"))
                shuffled = ask(server, shuffle_pictures(quiz, demo.seed), cli.counter("answers with shuffled pictures"))
                figure(f"{len(quiz + shuffled)} answers")
        loss = draw_loss(read_metrics(locate(f"{runs}/demo")))
    write_report(demo.out, stages, quiz, shuffled, memory.bytes, loss)


if __name__ == "__main__":
    cli.run(main)
