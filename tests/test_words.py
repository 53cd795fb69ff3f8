"""support/words.py: counting words, and the lists that help a small model."""

from __future__ import annotations

import doctest

import pytest

from support import words
from support.words import (clean_query, count_words, echoes, near_duplicates, word_list,
                           words_of)

PERSONA = "You are a careful chemist who explains each reaction."


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


@pytest.mark.parametrize(("text", "expected"), [
    ("How do tides work here?", "How do tides work here?"),
    ("  \n\n How do tides work here? \nSecond line.", "How do tides work here?"),
    ("1. How do tides work here?", "How do tides work here?"),
    ("12) How do tides work here?", "How do tides work here?"),
    ("- How do tides work here?", "How do tides work here?"),
    ('3. "How do tides work here?"', "How do tides work here?"),
    ('How do "spring tides" work here?', 'How do "spring tides" work here?'),
    ("2024 was a year of what?", "2024 was a year of what?"),  # a number that is no numbering
    ("3.5 metres is how many feet?", "3.5 metres is how many feet?"),
    ("„Wie wird ein Brot knusprig?“", "Wie wird ein Brot knusprig?"),
    ("“面包怎么烤才会脆？”", "面包怎么烤才会脆？"),
    ("亲爱的导游您好呀，", None),  # an address, and then the line ends
    ("Wie funktioniert Ebbe und Flut?", "Wie funktioniert Ebbe und Flut?"),
    ("\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f",
     "\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f"),
    ("How do tides work?", None),  # four words
    ("", None), (" \n \t\n", None), ("1.", None), ('"', None),
    ("Here are some questions for you:", None),  # announces what the first line lacks
    ("When you come to the sea,", None),
    (" ".join(["why?"] * 60), " ".join(["why?"] * 60)),
    (" ".join(["why?"] * 61), None),
    # Five words of the persona in a row are an echo, whatever the case; four are not.
    ("Are you A CAREFUL, chemist who explains fire?", None),
    ("Are you a careful chemist and teacher?", "Are you a careful chemist and teacher?")])
def test_clean_query(text: str, expected: str | None) -> None:
    """Numbering, quotes or a second line would be part of a query; or one would be kept that is too
    short, too long, cut off or an echo of the persona."""
    assert clean_query(text, "Nothing like it.", PERSONA) == expected


def test_echoes_in_scripts_without_spaces() -> None:
    """Ten Chinese characters in a row, five words, are an echo; a phrase that any two texts may
    share is none, and neither are the same words in another order."""
    persona = "你是一位熟悉中国各地的导游。"
    assert echoes("请问一位熟悉中国各地的导游在哪", persona)
    assert not echoes("请问熟悉中国各地的人在哪", persona)
    assert not echoes("导游的各地中国熟悉一位是你", persona)


def test_near_duplicates_in_scripts_without_spaces() -> None:
    """Two Chinese questions that differ in one character would both be kept."""
    one, two = (set(words_of(t)) for t in ("面包怎么烤才脆？", "面包怎么烤才软？"))
    other = set(words_of("春天去哪里旅行好？"))
    assert near_duplicates(one, two) and not near_duplicates(one, other)


@pytest.mark.parametrize("name", ["openings", "should_refuse"])
def test_lists_are_clean(name: str) -> None:
    """An empty or repeated line would be an opening, or a request, of its own."""
    found = word_list(name)
    assert found and len(set(found)) == len(found)
    assert all(line == line.strip() and line for line in found)
