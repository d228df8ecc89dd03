"""Stop strings are found wherever the text is cut, and nothing is held back that could be shown."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.text.stop_strings import StopStringMatcher


def run(stop: list[str], pieces: list[str], include: bool = False) -> tuple[str, bool]:
    """All that is emitted, and whether a stop string was found."""
    matcher = StopStringMatcher(stop, include)
    shown = ""
    for piece in pieces:
        text, matched = matcher.feed(piece)
        shown += text
        if matched:
            return shown, True
    return shown + matcher.finish(), False


def test_a_stop_string_across_many_pieces_is_cut_out():
    assert run(["</answer>"], ["42<", "/", "ans", "wer", "> and more"]) == ("42", True)


def test_or_kept_if_asked_for():
    assert run(["</answer>"], ["42<", "/ans", "wer> and more"], include=True) == ("42</answer>", True)


def test_only_what_could_become_a_stop_string_is_held_back():
    matcher = StopStringMatcher(["\n\nUser:"])
    assert matcher.feed("one\n") == ("one", False)
    assert matcher.feed("two\n") == ("\ntwo", False)
    assert matcher.feed("\nUse") == ("", False)
    assert matcher.feed("d") == ("\n\nUsed", False)
    assert matcher.finish() == ""


def test_held_text_comes_out_at_the_end():
    assert run(["STOP"], ["no STO"]) == ("no STO", False)


def test_a_prefix_that_repeats_is_not_lost():
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", True)


def test_the_match_that_ends_first_wins_and_of_those_the_longest():
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", True)
    assert run(["c", "abc"], ["xabcd"]) == ("x", True)


def test_completed_stop_strings_are_text_while_not_allowed():
    matcher = StopStringMatcher(["ab", "abab!"])
    assert matcher.feed("ababx", allowed=False) == ("ababx", False)
    assert matcher.feed("ab", allowed=False) == ("", False)  # it may become the longer one
    assert matcher.feed("ab!") == ("ab", True)  # "ab" ends first, in the allowed part


def test_a_stop_string_may_begin_while_not_allowed():
    matcher = StopStringMatcher(["END"])
    assert matcher.feed("x E", allowed=False) == ("x ", False)
    assert matcher.feed("ND y") == ("", True)


def first_match(stop: list[str], text: str) -> tuple[int, int] | None:
    """(start, end) by the definition: the smallest end, then the smallest start."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(ends)[::-1] if ends else None


@settings(max_examples=1000, deadline=None)
@given(
    stop=st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab.c", max_size=6), max_size=12),
    include=st.booleans(),
)
def test_the_result_is_that_of_searching_the_whole_text(stop, pieces, include):
    text = "".join(pieces)
    match = first_match(stop, text)
    expected = (text, False) if match is None else (text[: match[include]], True)
    assert run(stop, pieces, include) == expected


@settings(max_examples=500, deadline=None)
@given(
    stop=st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab.c", max_size=6), max_size=12),
    allowed_from=st.integers(0, 12),
)
def test_nothing_more_than_necessary_is_held_back(stop, pieces, allowed_from):
    matcher = StopStringMatcher(stop)
    text, shown = "", ""
    for index, piece in enumerate(pieces):
        text += piece
        emitted, matched = matcher.feed(piece, allowed=index >= allowed_from)
        shown += emitted
        if matched:
            return
        starts = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        assert shown == text[: len(text) - max(starts, default=0)]


@pytest.mark.parametrize("stop", [["a" * 1000 + "b"] * 64, ["ab" * 500 + "c"] * 64])
def test_hostile_stop_strings_cost_linear_time(stop):
    matcher = StopStringMatcher(stop)
    text = "ab" * 5000 if "ab" in stop[0][:2] else "a" * 10_000
    start = time.perf_counter()
    for position in range(0, len(text), 4):
        matcher.feed(text[position : position + 4])
    # 10,000 characters x 64 stop strings at about 0.2 us each; a quadratic search takes minutes.
    assert time.perf_counter() - start < 5
