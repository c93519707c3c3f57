"""A run with two committed checkpoints of different weights, and questions that the first of them answers right."""

from dataclasses import replace
from pathlib import Path

import torch

from mqwen.data.sample import Sample
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.evaluate.answerer import Answerer, Generation
from mqwen.evaluate.evaluation import Actors, Evaluation
from mqwen.model import MQWenProcessor
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import Location, locate
from mqwen.train.build import starting_point
from mqwen.train.export import export
from mqwen.train.loop import Progress
from mqwen.train.recipes import demo
from mqwen.train.run import open_run
from mqwen.train.saver import Saver
from mqwen.train.settings import RunSettings
from tests.data.making import random_sample, write_dataset
from tests.train.conftest import in_group
from tests.train.making import fresh_strategy

QUESTIONS = 24
MAX_TOKENS = 8


def make_run(folder: Path) -> Location:
    """The demo's model, untrained: the seed of a checkpoint's weights is its step."""
    (folder / "tokenizer").mkdir()
    train_vocabulary(vocabulary_texts(), 400, folder / "tokenizer" / VOCABULARY_FILE)
    settings = replace(demo(), name="first", runs=str(folder / "runs"), tokenizer=str(folder / "tokenizer"))
    with open_run(settings, *starting_point(settings)) as run:
        in_group(0, 1, folder / "meeting", commit_two, (run, settings))
    return run


def commit_two(rank: int, workers: int, run: Location, settings: RunSettings) -> None:
    saver = Saver(run, settings)
    for step in (1, 2):
        strategy = fresh_strategy(replace(settings, seed=step))
        saver.save(strategy.state(), Progress(step, (0, 0, step)))
        saver.wait()


def make_all(folder: Path) -> tuple[list[Sample], list[str]]:
    """Writes FOLDER/runs/first and FOLDER/heldout, a dataset whose answers are those of the checkpoint of step 1.

    Returns its samples, and what the checkpoint of step 2 answers.
    """
    torch.set_num_threads(1)
    run = make_run(folder)
    processor = MQWenProcessor.from_pretrained(run_artifact(run, folder, 1))
    asked = [random_sample(seed) for seed in range(QUESTIONS)]
    write_dataset(folder / "blank", processor, asked)
    first, second = (answers(run_artifact(run, folder, step), folder / "blank") for step in (1, 2))
    samples = [
        replace(sample, messages=[*sample.messages[:-1], {"role": "assistant", "content": answer}])
        for sample, answer in zip(asked, first, strict=True)
    ]
    write_dataset(folder / "heldout", processor, samples)
    return samples, second


def run_artifact(run: Location, folder: Path, step: int) -> Path:
    if not (folder / f"artifact-{step}").exists():
        export(run, locate(folder / f"artifact-{step}"), step)
    return folder / f"artifact-{step}"


def answers(artifact: Path, dataset: Path) -> list[str]:
    """The last answer of each sample, by key."""
    evaluation = Evaluation.prepare(locate(artifact), locate(dataset), Generation(MAX_TOKENS), Actors())
    answerer = Answerer(evaluation.artifact, evaluation.dataset, evaluation.generation, gpu=False)
    return [one.answer for one in answerer.answer(evaluation.places)]
