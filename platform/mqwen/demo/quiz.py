"""The demo's examination: questions about pictures of digits that training never saw, asked over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from mqwen.data.sources.digits import KINDS, QUESTIONS, Language, answer, draw
from mqwen.demo.stages import StageError
from mqwen.release import client
from mqwen.release.client import Chat, Server

MAX_TOKENS = 16  # of an answer


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
    chats = [
        Chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.text}]}], [one.picture])
        for one in quiz
    ]
    replies = client.ask(server, chats, MAX_TOKENS, progress)
    if error := next((reply.error for reply in replies if reply.error), ""):
        raise StageError(f"the server left a question without an answer: {error}")
    return [replace(question, given=reply.text) for question, reply in zip(quiz, replies, strict=True)]


def score(quiz: list[Question]) -> dict[str, dict[str, float]]:
    """Share of right answers by kind and language."""
    return {
        kind: {
            language: float(np.mean([q.right for q in quiz if q.kind == kind and q.language == language]))
            for language in get_args(Language)
        }
        for kind in KINDS
    }
