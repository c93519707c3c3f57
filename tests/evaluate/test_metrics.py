"""The scores against numbers from elsewhere and by hand."""

import math

import pytest

from mqwen.evaluate.metrics import cider_d, exact_match, words

ANSWERS = [
    "a man rides a brown horse on the beach",
    "two dogs play with a red ball in the snow",
    "a cat",
    "the horse on the beach a man rides the the the the",
    "a plate of food with rice and vegetables on a table",
]
REFERENCES = [
    ["a man riding a brown horse on the beach", "a man rides a horse along the sea"],
    ["two dogs play in the snow", "dogs are playing with a ball", "two dogs with a red ball"],
    ["a cat sleeps on a red sofa"],
    ["a man rides a brown horse on the beach"],
    ["rice and vegetables on a white plate", "a plate of food on a table"],
]
THEIRS = [3.642589, 2.895177, 1.785571, 2.199522, 3.855288]
"""What `aac_metrics.functional.cider_d` (aac-metrics 0.6.0, after the COCO caption server's code) gives for these."""


def test_cider_d_equals_another_implementation() -> None:
    assert cider_d(ANSWERS, REFERENCES) == pytest.approx(THEIRS, abs=1e-6)


def test_cider_d_by_hand() -> None:
    """Two samples: a word of one reference only weighs log 2, a word of both nothing."""
    found = cider_d(["red ball red", "the hat"], [["red box"], ["the hat"]])
    # One word: (2, 1) log 2 against (1, 1) log 2, clipped to one "red": 1 / (sqrt(5) sqrt(2)); of longer ones none is
    # shared. A word too many: exp(-1 / 72).
    assert found[0] == pytest.approx(10 / 4 * math.exp(-1 / 72) / math.sqrt(10))
    assert found[1] == pytest.approx(10 * 2 / 4)  # one word and two words, nothing longer is there


def test_cider_d_of_nothing() -> None:
    assert cider_d([], []) == []
    assert cider_d(["", "a b"], [["a b"], [""]]) == [0.0, 0.0]
    assert cider_d(["a b"], [["a b"]]) == [0.0]  # of one document every word is common


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red-brown Dog, 3 years old.", ["a", "red", "brown", "dog", "3", "years", "old"]),
        ("图片里是3个数字。", ["图", "片", "里", "是", "3", "个", "数", "字"]),
        ("Straße über ひらがな", ["straße", "über", "ひ", "ら", "が", "な"]),
        ("…!?", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_exact_match_looks_past_white_space_alone() -> None:
    assert exact_match(" three\n", "three")
    assert not exact_match("Three", "three")
    assert not exact_match("three.", "three")
