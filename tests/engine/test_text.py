from __future__ import annotations

import itertools
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.engine.text import StopStrings, Utf8Stream

T = TypeVar("T", str, bytes)


def _cut(whole: T, cuts: list[int]) -> list[T]:
    edges = sorted({0, len(whole), *(c % (len(whole) + 1) for c in cuts)})
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


_cuts = st.lists(st.integers(0, 200), max_size=12)


@given(st.one_of(st.binary(max_size=40), st.text("aé€🙂", max_size=20).map(str.encode)), _cuts)
def test_any_cut_gives_the_text_of_the_whole(whole: bytes, cuts: list[int]) -> None:
    stream = Utf8Stream()
    text = "".join(stream.feed(piece) for piece in _cut(whole, cuts)) + stream.flush()
    assert text == whole.decode("utf-8", "replace")


def test_a_character_appears_when_its_last_byte_does() -> None:
    stream = Utf8Stream()
    assert [stream.feed(bytes([b])) for b in "🙂a".encode()] == ["", "", "", "🙂", "a"]
    assert stream.flush() == ""


def test_a_character_never_completed_becomes_one_replacement_at_the_end() -> None:
    stream = Utf8Stream()
    assert stream.feed(b"ab\xf0\x9f\x99") == "ab"
    assert stream.flush() == "\ufffd"
    assert stream.feed(b"c") == "c"


def _expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: what StopStrings promises."""
    for end in range(1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4),
    _cuts,
)
def test_stop_strings_end_the_same_text_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    filtered = StopStrings(stops)
    shown = ""
    for piece in _cut(text, cuts):
        shown += filtered.feed(piece)
        # never more than the answer, never a stop string
        assert _expected(text, stops)[0].startswith(shown)
    shown += filtered.flush()
    assert (shown, filtered.matched) == _expected(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["</s>", "\n\n"])
    assert [stops.feed(p) for p in ("ab\n", "c<", "/x", "</", "s")] == ["ab", "\nc", "</x", "", ""]
    assert stops.feed(">after") == ""
    assert stops.matched == "</s>"
    assert stops.feed("more") == ""
    assert stops.flush() == ""


def test_the_end_releases_what_was_held() -> None:
    stops = StopStrings(["###"])
    assert stops.feed("a##") == "a"
    assert stops.flush() == "##"


def test_an_empty_stop_string_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
