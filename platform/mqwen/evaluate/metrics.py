"""How near answers come to what was expected."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")

NGrams = Counter[tuple[str, ...]]


def exact_match(answer: str, expected: str) -> bool:
    """The same text, but for white space around it."""
    return answer.strip() == expected.strip()


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; in Chinese, Japanese and Korean each character is one."""
    return _WORD.findall(text.lower())


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer against its references, 0 to 10; their mean is the corpus's score.

    Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 5: cosine
    similarity of tf-idf n-grams, n = 1 to 4, counts clipped to the reference's, with a Gaussian penalty for another
    length. The frequencies are the references' own, one document a sample, as in the COCO server: of a single sample
    every n-gram is in every document, and the score is 0. An answer with fewer words than n has no n-gram of that
    length, so that a right one of a single word gets 2.5.
    """
    expected = [[_ngrams(words(text)) for text in texts] for texts in references]
    documents = Counter(gram for texts in expected for gram in set().union(*texts))
    total = math.log(len(references)) if references else 0.0

    def weights(grams: NGrams) -> list[dict[tuple[str, ...], float]]:
        """By n-gram length: how often each n-gram is there, times how rare it is."""
        by_length: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            by_length[len(gram) - 1][gram] = count * (total - math.log(max(1, documents[gram])))
        return by_length

    def similarity(answer: NGrams, reference: NGrams) -> float:
        penalty = math.exp(-((_length(answer) - _length(reference)) ** 2) / (2 * SIGMA**2))
        parts = [_clipped_cosine(*pair) for pair in zip(weights(answer), weights(reference), strict=True)]
        return 10 * penalty * sum(parts) / LONGEST

    given = [_ngrams(words(answer)) for answer in answers]
    return [
        sum(similarity(answer, text) for text in texts) / len(texts)
        for answer, texts in zip(given, expected, strict=True)
    ]


def _ngrams(text: list[str]) -> NGrams:
    return Counter(tuple(text[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(text) - n + 1))


def _length(grams: NGrams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _clipped_cosine(answer: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    product = sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in answer.items())
    norms = math.hypot(*answer.values()) * math.hypot(*reference.values())
    return product / norms if norms else 0.0
