"""The demo's data: real handwritten digits, drawn into pictures of one to three, with questions and answers.

The digits are the 1,797 of 8 x 8 pixels that scikit-learn ships (UCI ML hand-written digits, CC BY 4.0). A part
of them is held out: pictures that test a model are made of those alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from mqwen.data.sample import Sample
from mqwen.model.picture import CLIP_MEAN

SIDE = 96  # pixels of a picture's side
JITTER = 3  # pixels that a digit may stand above or below the middle
HELD_OUT = 360  # glyphs of 1,797
Split = Literal["train", "heldout"]
Language = Literal["en", "zh"]

_WORDS = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "zh": ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九"],
}
QUESTIONS: dict[str, dict[str, str]] = {
    "which": {"en": "Which digit is this?", "zh": "这是哪个数字?"},
    "read": {"en": "Which digits are these?", "zh": "这些是哪些数字?"},
    "count": {"en": "How many digits are there?", "zh": "有几个数字?"},
    "leftmost": {"en": "Which digit is leftmost?", "zh": "最左边是哪个数字?"},
    "sum": {"en": "What is the sum of the digits?", "zh": "这些数字的和是多少?"},
}
KINDS = tuple(QUESTIONS)
WEIGHTS = {"which": 3, "read": 2, "count": 1, "leftmost": 2, "sum": 4}  # how often each is asked: by how hard it is


def kinds_for(digits: list[int]) -> list[str]:
    """Which kinds of question a picture of these digits allows: one digit is named, several are read and added."""
    return ["which", "count"] if len(digits) == 1 else ["read", "count", "leftmost", "sum"]


def answer(kind: str, language: Language, digits: list[int]) -> str:
    words = _WORDS[language]
    match kind:
        case "which" | "leftmost":
            return words[digits[0]]
        case "read":
            return " ".join(str(digit) for digit in digits)
        case "count":
            return words[len(digits)] if language == "en" else f"{words[len(digits)]}个"
        case "sum":
            # With its working: a small model adds what it has read.
            return f"{'+'.join(map(str, digits))}={sum(digits)}"
    raise ValueError(f"kind {kind!r} is unknown; allowed are {', '.join(KINDS)}")


def vocabulary_texts() -> list[str]:
    """Every text of the demo, for its vocabulary."""
    texts = [text for questions in QUESTIONS.values() for text in questions.values()]
    texts += [word for words in _WORDS.values() for word in words]
    return texts + [answer("count", "zh", [0] * n) for n in (1, 2, 3)] + ["system", "user", "assistant", "\n"]


@cache
def _glyphs(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (glyphs, 8, 8) in 0..1 and the digit of each."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:HELD_OUT] if split == "heldout" else order[HELD_OUT:]
    return data.images[chosen] / 16.0, data.target[chosen]


def draw(split: Split, random: np.random.Generator, count: int | None = None) -> tuple[bytes, list[int]]:
    """A JPEG of `count` digits (one to three by default) side by side, and their values from left to right."""
    pictures, values = _glyphs(split)
    count = count or int(random.integers(1, 4))
    chosen = random.integers(len(values), size=count)
    ink, paper = random.uniform(0.9, 1.0), np.array(CLIP_MEAN) + random.uniform(-0.04, 0.04, 3)
    canvas = np.zeros((SIDE, SIDE))
    slots = np.sort(random.choice(3, count, replace=False))
    for slot, glyph in zip(slots, chosen, strict=True):
        size = int(random.integers(28, SIDE // 3 + 1))
        image = Image.fromarray((pictures[glyph] * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        x = slot * SIDE // 3 + int(random.integers(SIDE // 3 - size + 1))
        y = (SIDE - size) // 2 + int(random.integers(-JITTER, JITTER + 1))
        canvas[y : y + size, x : x + size] = np.asarray(image) / 255.0
    pixels = paper + canvas[..., None] * (ink - paper) + random.normal(0, 0.02, (SIDE, SIDE, 1))
    buffer = io.BytesIO()
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), [int(values[glyph]) for glyph in chosen]


@dataclass(frozen=True)
class DigitsSource:
    """The demo's: `pictures` of handwritten digits, each with a question. The same seed draws the same."""

    pictures: int
    seed: int = 0
    split: Split = "train"

    def chunks(self, size: int) -> list[range]:
        return [range(i, min(i + size, self.pictures)) for i in range(0, self.pictures, size)]

    def read(self, chunk: range) -> Iterator[tuple[str, Sample]]:
        for number in chunk:
            yield f"{self.split}-{number:06d}", self._sample(number)

    def _sample(self, number: int) -> Sample:
        random = np.random.default_rng([self.seed, number])
        picture, digits = draw(self.split, random)
        # One question a picture: with several, the later answers can be had from the earlier ones without looking.
        kind = str(random.choice([kind for kind in kinds_for(digits) for _ in range(WEIGHTS[kind])]))
        language = random.choice(get_args(Language))
        question = {"type": "text", "text": QUESTIONS[kind][language]}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, question]},
            {"role": "assistant", "content": answer(kind, language, digits)},
        ]
        return Sample(f"digits-{self.split}-{number:06d}", messages, [picture], f"digits/{self.split}/{number}")
