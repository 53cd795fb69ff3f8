"""support/words.py: counting words, and the lists that help a small model."""

import pytest

from support.words import (clean_query, count_words, echoes, near_duplicates, word_list, words_of)

PERSONA = "You are a careful chemist who explains each reaction."
QUERY = "How do tides work here?"


@pytest.mark.parametrize(("text", "expected"), [
    ("\u6f6e\u6c50 tides", 2), ("\u0e19\u0e49\u0e33\u0e02\u0e36\u0e49\u0e19", 3),
    ("\uc870\uc218\ub294 \uc65c", 2)])
def test_words_of_scripts_with_and_without_spaces(text: str, expected: int) -> None:
    """Chinese and Thai have no spaces, Korean does: a query of theirs would be called too short."""
    assert count_words(text) == expected


LONGEST = " ".join(["why?"] * 60)
KEPT = ['How do "spring tides" work here?', "2024 was a year of what?",
        "3.5 metres is how many feet?", LONGEST,
        "Are you a careful chemist and teacher?"]  # four words of the persona
NO_QUERIES = ["How do tides work?", f"{LONGEST} why?", " \n \t\n", "1.", '"',
              "Here are some questions for you:", "When you come to the sea,",
              "亲爱的导游您好呀，", "Are you A CAREFUL, chemist who explains fire?"]


@pytest.mark.parametrize(("text", "expected"), [
    (f"  \n\n {QUERY} \nSecond line.", QUERY),
    (f"12) {QUERY}", QUERY), (f"- {QUERY}", QUERY), (f'3. "{QUERY}"', QUERY),
    ("„Wie wird ein Brot knusprig?“", "Wie wird ein Brot knusprig?"),
    ("“面包怎么烤才会脆？”", "面包怎么烤才会脆？"),
    *zip(KEPT, KEPT), *((text, None) for text in NO_QUERIES)])
def test_a_query_is_cleaned_kept_or_dropped(text: str, expected: str | None) -> None:
    """Numbering, quotes around it or a second line would be part of a query; quotes within, a
    number that is no numbering, or a phrase that it shares with the persona would be cut or drop
    it; or one too short, too long, cut off, or with five words of the persona would be kept."""
    assert clean_query(text, "Nothing like it.", PERSONA) == expected


def test_likeness_in_scripts_without_spaces() -> None:
    """Ten Chinese characters in a row, five words, are an echo; a phrase that any two texts may
    share is none, and neither are the same words in another order. Two questions that differ in
    one character are near-duplicates."""
    persona = "你是一位熟悉中国各地的导游。"
    assert echoes("请问一位熟悉中国各地的导游在哪", persona)
    assert not echoes("请问熟悉中国各地的人在哪", persona)
    assert not echoes("导游的各地中国熟悉一位是你", persona)
    one, two, other = (set(words_of(t)) for t in ("面包怎么烤才脆？", "面包怎么烤才软？",
                                                  "春天去哪里旅行好？"))
    assert near_duplicates(one, two) and not near_duplicates(one, other)


@pytest.mark.parametrize("name", ["openings", "should_refuse"])
def test_lists_are_clean(name: str) -> None:
    """An empty or repeated line would be an opening, or a request, of its own."""
    found = word_list(name)
    assert found and len(set(found)) == len(found)
    assert all(line == line.strip() and line for line in found)
