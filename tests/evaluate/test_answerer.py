"""An actor's work, without Ray: answers, losses, and what is left out."""

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mqwen.data.encode import encode
from mqwen.data.errors import DataError
from mqwen.data.filters import Filters
from mqwen.data.indexes import IndexWriter
from mqwen.data.manifest import Manifest, Shards, write_manifest
from mqwen.data.parts import PartWriter, write_part
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample, write_sample
from mqwen.data.sources.stored import WebDatasetSource
from mqwen.errors import UserError
from mqwen.evaluate.answerer import Answer, Answerer, Generation
from mqwen.evaluate.evaluation import Actors, Evaluation, scores, write_report
from mqwen.model import MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.chat import encode_chat
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.release.canary import Canary, draw
from mqwen.storage import Location, locate
from tests.data.making import picture, random_sample, write_dataset
from tests.engine.tiny import build_artifact, generate_alone

GENERATION = Generation(max_tokens=8)
SAMPLES = [random_sample(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_artifact(tmp_path_factory.mktemp("artifact") / "tiny", layers=2)


@pytest.fixture(scope="module")
def processor(artifact: Path) -> MQWenProcessor:
    return MQWenProcessor.from_pretrained(artifact)


@pytest.fixture(scope="module")
def make(processor: MQWenProcessor, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Sample]], Location]:
    return lambda samples: write_dataset(tmp_path_factory.mktemp("dataset"), processor, samples, 7)


def evaluate(artifact: Path, dataset: Location, generation: Generation = GENERATION) -> list[Answer]:
    """One actor that is asked everything at once; by key."""
    evaluation = Evaluation.prepare(locate(artifact), dataset, generation, Actors())
    answerer = Answerer(locate(artifact), evaluation.dataset, generation, gpu=False)
    return sorted(answerer.answer(evaluation.places), key=lambda answer: answer.key)


def test_answers_are_the_models_own_and_losses_those_of_all_logits(
    artifact: Path, processor: MQWenProcessor, make: Callable[[list[Sample]], Location]
) -> None:
    answers = evaluate(artifact, make(SAMPLES[::-1]))
    assert [answer.key for answer in answers] == [sample.key for sample in SAMPLES]
    model = MQWenLMHeadModel.from_pretrained(artifact).eval()
    clear = 0
    for sample, answer in zip(SAMPLES, answers, strict=True):
        assert answer.expected == sample.messages[-1]["content"]
        prompt = encode_chat(processor.tokenizer, sample.messages[:-1], add_generation_prompt=True).input_ids
        tokens, tie = generate_alone(model, processor, prompt, sample.pictures, GENERATION.max_tokens)
        if not tie:
            clear += 1
            assert answer.answer == processor.tokenizer.decode(tokens, skip_special_tokens=True)
        chat, pictures = encode(processor, sample)
        pixels = torch.from_numpy(np.stack(pictures)) if pictures else None
        with torch.inference_mode():
            mean = model(torch.tensor([chat.input_ids]), pixel_values=pixels, labels=torch.tensor([chat.labels])).loss
        assert answer.loss / answer.tokens == pytest.approx(mean.item(), rel=1e-5)
        assert not answer.right and not answer.error
    assert clear >= 20
    assert answers[0].question == next(
        part["text"] for part in SAMPLES[0].messages[-2]["content"][-1:] if isinstance(part, dict)
    )


@pytest.fixture(scope="module")
def in_place(processor: MQWenProcessor, tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Two tars of others, whose samples have the same keys, indexed where they lie."""
    folder = tmp_path_factory.mktemp("in-place")
    files, dataset = locate(folder / "files"), locate(folder / "data")
    source, shards = WebDatasetSource(files), list[dict]()
    writer = PartWriter(source, True, dataset, processor, Filters(), 100, 1 << 30)
    (folder / "files").mkdir()
    for number in range(2):
        with tarfile.open(folder / "files" / f"{number}.tar", "w") as tar:
            for n, sample in enumerate(SAMPLES[4 * number : 4 * number + 4]):
                write_sample(tar, replace(sample, key=f"{n:03d}"))
        part = writer._make(f"shard-{number:06d}", f"{number}.tar")
        write_part(dataset, number, part)
        shards += json.loads(IndexWriter(dataset)({"number": number, "dropped": bytes(part.rows.num_rows)})["shards"])
    write_manifest(dataset, Manifest(Shards(shards), processor.tokenizer.fingerprint, {}, str(files)))
    return dataset


KEYS = [f"{number}/{n:03d}" for number in range(2) for n in range(4)]


def test_answers_have_the_datasets_keys(artifact: Path, in_place: Location) -> None:
    """Not those inside of its files, which other files have too; and equal questions are drawn for by them."""
    answers = evaluate(artifact, in_place, replace(GENERATION, temperature=1.5))
    assert [answer.key for answer in answers] == KEYS
    assert not any(answer.error for answer in answers)


def test_neighbours_are_one_read(artifact: Path, in_place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a drawn canary, whose samples lie far apart, each is one: all between would be read with them."""
    read, ranges = Location.read_range, list[int]()
    monkeypatch.setattr(Location, "read_range", lambda *given: ranges.append(given[2]) or read(*given))
    evaluation = Evaluation.prepare(locate(artifact), in_place, GENERATION, Actors())
    samples = Samples([evaluation.dataset], evaluation.places)
    for place in evaluation.places:
        samples.read(place)
    sizes = [place.nbytes for place in evaluation.places]
    assert ranges == [sum(sizes[:4]), sum(sizes[4:])]
    ranges.clear()
    draw(Canary(questions=8), evaluation.dataset, evaluation.places)
    assert sorted(ranges) == sorted(sizes)


def test_a_canary_has_the_datasets_keys_too(artifact: Path, in_place: Location) -> None:
    evaluation = Evaluation.prepare(locate(artifact), in_place, GENERATION, Actors())
    drawn = draw(Canary(questions=6), evaluation.dataset, evaluation.places)
    assert len({sample.key for sample in drawn}) == 6
    assert {sample.key for sample in drawn} < set(KEYS)


def test_sampling_is_seeded_by_sample(artifact: Path, make: Callable[[list[Sample]], Location]) -> None:
    hot = replace(GENERATION, temperature=1.5)
    first, again, other = (
        [answer.answer for answer in evaluate(artifact, make(SAMPLES[:8]), generation)]
        for generation in (hot, hot, replace(hot, seed=1))
    )
    assert first == again
    assert first != other


def test_what_cannot_be_asked_is_left_out_and_named(
    artifact: Path, make: Callable[[list[Sample]], Location], tmp_path: Path
) -> None:
    long = Sample("long", [{"role": "user", "content": "many " * 600}, {"role": "assistant", "content": "七"}])
    unasked = Sample("unasked", [{"role": "assistant", "content": "seven"}])
    broken = Sample("broken", SAMPLES[0].messages, [picture(1)[:60] for _ in SAMPLES[0].pictures])
    dataset = make([long, unasked, broken, SAMPLES[1]])
    answers = evaluate(artifact, dataset)
    errors = {answer.key: answer.error.split(":")[0] for answer in answers}
    assert errors == {
        "broken": "picture" if SAMPLES[0].pictures else "",
        "long": "context_length_exceeded",
        "sample-0001": "",
        "unasked": "conversation",
    }
    found = scores(answers)
    assert (found["samples"], found["left_out"]) == (1, 3)
    with pytest.raises(DataError, match="none of 3 samples could be asked; the first, broken: picture"):
        scores([answer for answer in answers if answer.error])


def test_scores_are_written_and_come_out_the_same(
    artifact: Path, make: Callable[[list[Sample]], Location], tmp_path: Path
) -> None:
    evaluation = Evaluation.prepare(locate(artifact), make(SAMPLES[:4]), GENERATION, Actors())
    answers = [
        Answer("a", "q", "three red dogs", "three red dogs", True, 3.0, 3),
        Answer("b", "q", "a cat", "dogs", False, 5.0, 1),
        Answer("c", error="picture: unreadable"),
    ]
    assert write_report(locate(tmp_path), evaluation, answers) == {
        "samples": 2,
        "left_out": 1,
        "exact_match": 0.5,
        "cider_d": pytest.approx(7.5 / 2),
        "loss": 2.0,
        "answer_tokens": 4,
    }
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert '"exact_match": 0.5' in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"artifact": "nowhere"}, "nowhere: is no folder"),
        ({"artifact": "cut"}, "is cut short"),
        ({"dataset": "nowhere"}, "nowhere is no dataset"),
        ({"dataset": "empty"}, "holds no samples"),
        ({"dataset": "other"}, "was ingested with another tokenizer"),
        ({"generation": Generation(max_tokens=0)}, "--generation.max-tokens is 0; at least 1"),
        ({"generation": Generation(temperature=-1)}, "--generation.temperature is -1; at least 0"),
        ({"actors": Actors(count=0)}, "--actors.count is 0; at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_an_actor_starts(
    artifact: Path,
    processor: MQWenProcessor,
    make: Callable[[list[Sample]], Location],
    tmp_path: Path,
    change: dict,
    words: str,
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in artifact.iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    write_dataset(tmp_path / "empty", processor, [])
    train_vocabulary(["another"], 280, tmp_path / VOCABULARY_FILE)
    other = MQWenProcessor(MQWenTokenizer(tmp_path / VOCABULARY_FILE), image_size=48)
    write_dataset(tmp_path / "other", other, SAMPLES[:2])
    given = {"artifact": artifact, "dataset": make(SAMPLES[:2]).path, "generation": GENERATION, "actors": Actors()}
    given |= {name: tmp_path / value if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(UserError, match=words):
        Evaluation.prepare(locate(given["artifact"]), locate(given["dataset"]), given["generation"], given["actors"])
