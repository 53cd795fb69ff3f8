"""support/words.py: counting words, and the lists that help a small model."""

from __future__ import annotations

import doctest

import pytest

from support import words
from support.words import count_words, word_list, words_of


def test_the_worked_examples_are_true() -> None:
    """A docstring's example would not be what the function gives."""
    found = doctest.testmod(words)
    assert found.failed == 0 < found.attempted


@pytest.mark.parametrize(("text", "expected"), [
    ("How do tides work?", 4), ("", 0), (" \n ", 0), ("\u6f6e\u6c50 tides", 2),
    ("\u0e19\u0e49\u0e33\u0e02\u0e36\u0e49\u0e19", 3), ("\uc870\uc218\ub294 \uc65c", 2)])
def test_words_of_scripts_with_and_without_spaces(text: str, expected: int) -> None:
    """Chinese and Thai have no spaces, Korean does: a query of theirs would be called too short."""
    assert count_words(text) == expected


def test_words_have_no_case_and_no_punctuation() -> None:
    """Or near-duplicates would differ by a comma."""
    assert words_of("What, THEN? \u00c9t\u00e9!") == ["what", "then", "\u00e9t\u00e9"]


@pytest.mark.parametrize("name", ["openings", "long_openings", "contrast_openings",
                                  "request_words", "should_refuse"])
def test_lists_are_clean(name: str) -> None:
    """An empty or repeated line would be an opening, or a request, of its own."""
    found = word_list(name)
    assert found and len(set(found)) == len(found)
    assert all(line == line.strip() and line for line in found)
    if name == "request_words":
        assert all(line.islower() and len(line.split()) == 1 for line in found)
