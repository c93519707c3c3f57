"""Text that grows token by token: whole characters only, nothing of a stop text, and together what was generated."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqwen.engine.text import TextStream


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The texts given out for tokens whose bytes are `pieces`, the flushed rest last."""
    text = TextStream(lambda token: pieces[token], stop)
    given_out = []
    for token in range(len(pieces)):
        given_out.append(text.push(token))
        if text.stopped:
            break
    return [*given_out, text.flush()], text.stopped


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.text(), st.lists(st.integers(min_value=0)))
def test_text_comes_out_whole_however_its_bytes_are_cut(text: str, cuts: list[int]) -> None:
    given_out, _ = stream(split(text.encode(), cuts))
    assert "".join(given_out) == text
    assert all("\ufffd" not in piece for piece in given_out) or "\ufffd" in text


def test_a_character_waits_for_its_last_byte() -> None:
    given_out, _ = stream([b"\xe4", b"\xb8", b"\x89", b"!"])
    assert given_out == ["", "", "三", "!", ""]


def test_an_incomplete_character_at_the_end_is_one_replacement() -> None:
    given_out, _ = stream([b"a", b"\xe4\xb8"])
    assert given_out == ["a", "", "\ufffd"]


@given(
    st.text(alphabet="abc三", max_size=30),
    st.lists(st.text(alphabet="abc三", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(min_value=0)),
)
def test_stop_texts_cut_where_a_search_in_the_whole_text_finds_them(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    pieces = split(text.encode(), cuts)
    given_out, stopped = stream(pieces, tuple(stop))
    # The oracle: the text after each token, searched anew.
    expected, found = text, False
    for count in range(1, len(pieces) + 1):
        so_far = b"".join(pieces[:count]).decode(errors="ignore")
        places = [so_far.find(one) for one in stop if one in so_far]
        if places:
            expected, found = so_far[: min(places)], True
            break
    assert ("".join(given_out), stopped) == (expected, found)


@pytest.mark.parametrize("stop", ["ab", "abc"])
def test_what_may_begin_a_stop_text_is_held_back(stop: str) -> None:
    given_out, stopped = stream([b"xa", b"b", b"c"], (stop,))
    assert given_out[0] == "x"
    assert "".join(given_out) == "x"
    assert stopped
