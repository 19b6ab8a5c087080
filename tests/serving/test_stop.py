"""Stop strings: found wherever the pieces break, and never let through in part."""

import hypothesis
import pytest
from hypothesis import strategies as st

from jmoe.serving.stop import StopMatcher


def run(stop, pieces):
    matcher = StopMatcher(stop)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.found:
            return "".join(shown), True, shown
    shown.append(matcher.flush())
    return "".join(shown), False, shown


def test_text_that_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("a E", "N", "x", "E", "ND after")] == ["a ", "", "ENx", "", ""]
    assert matcher.found and matcher.push("more") == "" and matcher.flush() == ""


def test_what_was_held_back_is_shown_when_the_text_ends():
    assert run(["END"], ["so EN"])[:2] == ("so EN", False)


def test_the_stop_string_that_begins_first_wins():
    assert run(["world", "lo w"], ["hello world"])[:2] == ("hel", True)
    assert run(["b", "abc"], ["xabc"])[:2] == ("x", True)


def test_without_stop_strings_text_passes_at_once():
    matcher = StopMatcher([])
    assert matcher.push("anything") == "anything" and matcher.flush() == ""


def test_a_repeated_beginning_does_not_hide_a_match():
    assert run(["aab"], ["a", "a", "a", "b", "c"])[:2] == ("a", True)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_same_text_is_shown_however_it_is_cut(size):
    text = "abcabcabdabc stop stopping"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert run(["abd"], pieces)[:2] == ("abcabc", True)
    assert run(["zzz"], pieces)[:2] == (text, False)


@hypothesis.given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_shown_text_is_what_precedes_the_first_stop_string(pieces, stop):
    """Pieces are pushed one by one; the match is the first one complete at the end of a piece."""
    seen = ""
    expected = None
    for piece in pieces:
        seen += piece
        if starts := [seen.find(s) for s in stop if s in seen]:
            expected = seen[: min(starts)]
            break
    text, found, shown = run(stop, pieces)
    assert found == (expected is not None)
    assert text == ("".join(pieces) if expected is None else expected)
    held = 0
    for piece, part in zip(pieces, shown, strict=False):
        held += len(piece) - len(part)
        assert found or 0 <= held < max(map(len, stop))
