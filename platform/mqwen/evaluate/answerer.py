"""What each actor does: it holds the model and answers batches of samples."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mqwen.data.dataset import Dataset
from mqwen.data.encode import encode
from mqwen.data.errors import SampleError
from mqwen.data.order import Place
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample
from mqwen.engine.request import Request, RequestError
from mqwen.errors import UserError
from mqwen.evaluate.metrics import exact_match
from mqwen.model.chat import IGNORED, EncodedChat, encode_chat, text_of
from mqwen.model.errors import ConversationError
from mqwen.storage import Location, local_folder


@dataclass(frozen=True)
class Generation:
    """`max_tokens`: most of an answer. `temperature` 0 is greedy; above it `seed` decides what is drawn."""

    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A sample's last answer, asked again from the turns before it.

    `loss` is summed over the `tokens` of all of the sample's answers, as training counts them. `error`: why the sample
    was left out, or "".
    """

    key: str
    question: str = ""
    expected: str = ""
    answer: str = ""
    right: bool = False
    loss: float = 0.0
    tokens: int = 0
    error: str = ""


class Answerer:
    """artifact: actors on one node share a copy. losses: without them answers have a loss of 0, and come sooner."""

    def __init__(
        self, artifact: Location, dataset: Dataset, generation: Generation, gpu: bool, losses: bool = True
    ) -> None:
        # Imported here: the driver imports this module, and needs no torch.
        from mqwen.engine.engine import Engine
        from mqwen.engine.loading import load_artifact

        self._model, self._processor = load_artifact(local_folder(artifact), gpu=gpu)
        self._engine = Engine(self._model, self._processor)
        self._dataset, self._generation, self._losses = dataset, generation, losses

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Ray Data's: a row with a pickled list of places to a row with a pickled list of answers.

        What it raises would reach the driver with a trace for text: an error meant for people goes by the row.
        """
        (places,) = (pickle.loads(data) for data in batch["places"].to_pylist())  # noqa: S301 (ours)
        try:
            answers, failed = self.answer(places), ""
        except UserError as error:
            answers, failed = [], str(error)
        return pa.table({"answers": [pickle.dumps(answers)], "failed": [failed]})

    def answer(self, places: Sequence[Place]) -> list[Answer]:
        """One for each place, in their order. Raises StorageError where storage fails."""
        samples = Samples([self._dataset], places)
        answers: list[Answer] = []
        requests: list[Request] = []
        for at, place in enumerate(places):
            try:
                answer, request = self._ask(samples.read(place), place.key, str(at))
                answers.append(answer)
                requests.append(request)
            except SampleError as error:
                answers.append(Answer(place.key, error=str(error)))
        for request, reply in zip(requests, self._engine.generate_all(requests), strict=True):
            at = int(request.request_id)
            if isinstance(reply, RequestError):
                answers[at] = Answer(places[at].key, error=f"{reply.code}: {reply}")
            else:
                right = exact_match(reply.text, answers[at].expected)
                answers[at] = replace(answers[at], answer=reply.text, right=right)
        return answers

    def _ask(self, sample: Sample | SampleError, key: str, request_id: str) -> tuple[Answer, Request]:
        """The sample's answer without what the model says, and the request for that. `key` is the dataset's: a file
        that was indexed in place has keys of its own, as other files do."""
        if isinstance(sample, SampleError):
            raise sample
        chat, pictures = encode(self._processor, sample)
        *before, last = sample.messages
        try:
            prompt = encode_chat(self._processor.tokenizer, before, add_generation_prompt=True)
        except ConversationError as error:
            raise SampleError("conversation", str(error)) from error
        generation = self._generation
        request = Request(
            request_id,
            prompt.input_ids,
            sample.pictures,
            generation.max_tokens,
            generation.temperature,
            seed=int.from_bytes(hashlib.sha256(f"{generation.seed} {key}".encode()).digest()[:8]),
        )
        loss, tokens = self._loss(chat, pictures) if self._losses else (0.0, 0)
        return Answer(key, text_of(before[-1]), text_of(last), loss=loss, tokens=tokens), request

    def _loss(self, chat: EncodedChat, pictures: list[np.ndarray]) -> tuple[float, int]:
        """The summed loss of the answers' tokens, and their number. The engine rests meanwhile."""
        import torch

        with torch.inference_mode():
            output = self._model(
                torch.tensor([chat.input_ids]),
                labels=torch.tensor([chat.labels]),
                pixel_values=torch.from_numpy(np.stack(pictures)) if pictures else None,
                logits_to_keep="labels",
                num_items_in_batch=1,
            )
        return output.loss.item(), sum(label != IGNORED for label in chat.labels)
