"""The demo's examination: questions about pictures of digits that training never saw, asked over HTTP."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import httpx
import numpy as np

from mqwen.data.sources.digits import KINDS, QUESTIONS, Language, answer, draw
from mqwen.demo.serving import Server

AT_ONCE = 16  # requests under way
TIMEOUT = 60.0  # seconds for one answer


@dataclass(frozen=True)
class Question:
    kind: str
    language: Language
    text: str
    picture: bytes
    expected: str
    given: str = ""

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected


def make_quiz(pictures: int, seed: int) -> list[Question]:
    """`pictures` held-out pictures for each kind of question; each is asked about in each language."""
    random = np.random.default_rng(seed)
    quiz = []
    for kind in KINDS:
        digits_wanted = {"which": [1], "count": [1, 2, 3]}.get(kind, [2, 3])
        for _ in range(pictures):
            picture, digits = draw("heldout", random, int(random.choice(digits_wanted)))
            for language in get_args(Language):
                text = QUESTIONS[kind][language]
                quiz.append(Question(kind, language, text, picture, answer(kind, language, digits)))
    return quiz


def shuffle_pictures(quiz: list[Question], seed: int) -> list[Question]:
    """The same questions, each with the picture of another one of its kind: what a model scores that does not look."""
    random = np.random.default_rng(seed)
    shuffled = list(quiz)
    for kind in KINDS:
        places = [i for i, question in enumerate(quiz) if question.kind == kind]
        turn = int(random.integers(1, len(places) // 2)) * 2  # both languages of a picture get the same other one
        for place, other in zip(places, places[turn:] + places[:turn], strict=True):
            shuffled[place] = replace(quiz[place], picture=quiz[other].picture)
    return shuffled


def ask(server: Server, quiz: list[Question], progress: Callable[[int, int], None]) -> list[Question]:
    """The quiz with the server's answers; `progress` is told how many came of how many."""

    async def ask_all() -> list[Question]:
        gate, done = asyncio.Semaphore(AT_ONCE), 0
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=TIMEOUT) as client:

            async def ask_one(question: Question) -> Question:
                nonlocal done
                picture = "data:image/jpeg;base64," + base64.b64encode(question.picture).decode()
                parts = [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": question.text},
                ]
                messages = [{"role": "user", "content": parts}]
                body = {"model": server.model, "messages": messages, "max_tokens": 16, "temperature": 0}
                async with gate:
                    reply = await client.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                done += 1
                progress(done, len(quiz))
                return replace(question, given=reply.json()["choices"][0]["message"]["content"])

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask_one(question)) for question in quiz]
            return [task.result() for task in tasks]

    return asyncio.run(ask_all())


def score(quiz: list[Question]) -> dict[str, dict[str, float]]:
    """Share of right answers by kind and language."""
    return {
        kind: {
            language: float(np.mean([q.right for q in quiz if q.kind == kind and q.language == language]))
            for language in get_args(Language)
        }
        for kind in KINDS
    }
