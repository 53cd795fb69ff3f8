"""What a query has to look like, and the hand-made English lists in support/data/."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path

from support.refusals import refuses

MIN_WORDS, MAX_WORDS = 5, 60  # of a query
ECHO_WORDS = 5  # a text that repeats so many words of another in a row is an echo
NEAR_DUPLICATE = 0.7  # Jaccard similarity of word sets from which two queries count as one
UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"  # Thai, Japanese and Chinese characters


def word_list(name: str) -> tuple[str, ...]:
    """The lines of support/data/NAME.txt."""
    path = Path(__file__).parent / "data" / f"{name}.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


def count_words(text: str) -> int:
    """Words of a text; scripts that do not separate words count two characters as one.

    >>> count_words("How do tides work?"), count_words("\u6f6e\u6c50\u5982\u4f55\u8fd0\u4f5c")
    (4, 3)
    """
    unspaced = len(re.findall(UNSPACED, text))
    return unspaced // 2 + len(re.sub(UNSPACED, " ", text).split())


@cache
def request_words() -> frozenset[str]:
    """English words that begin an imperative."""
    return frozenset(word_list("request_words"))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def near_duplicates(one: set[str], other: set[str]) -> bool:
    """Whether two sets of words count as one query."""
    return len(one & other) >= NEAR_DUPLICATE * len(one | other)


def echoes(text: str, source: str) -> bool:
    """Whether a text repeats ECHO_WORDS words of its source in a row."""
    words, others = words_of(text), words_of(source)
    runs = {tuple(others[i:i + ECHO_WORDS]) for i in range(len(others) - ECHO_WORDS + 1)}
    return any(tuple(words[i:i + ECHO_WORDS]) in runs for i in range(len(words)))


def is_request(line: str) -> bool:
    """Whether a line asks for something: a question, an imperative, a wish; not "the user ..."."""
    words = re.findall(r"[\w']+", line.lower())
    if not words or words[:2] in (["the", "user"], ["a", "user"]):
        return False
    wish = re.search(r"\b(?:please|help|advice|i (?:need|want)|i(?:'d| would) like|i wonder)\b",
                     line.lower())
    question = re.search("[?？؟;՞፧]$|[?？؟]", line)
    return bool(question or words[0] in request_words() or wish
                or line.startswith(("In three bullet points", "True or false")))


def clean_query(text: str, persona: str = "") -> str | None:
    """First non-empty line without list numbering or surrounding quotes; None if it is no question
    or request, or repeats a run of ECHO_WORDS words of the persona.

    What counts as a request is English (`is_request`); a question mark works in any language.

    >>> clean_query('1. "How do tides work in a bay?"')
    'How do tides work in a bay?'
    """
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    line = re.sub(r"^(?:\d{1,2}[.)]|[-*])\s+", "", line).strip()
    if len(line) > 1 and line[0] == line[-1] == '"':
        line = line[1:-1].strip()
    # A line that ends in a colon announces something that the first-line rule has cut off.
    if not MIN_WORDS <= count_words(line) <= MAX_WORDS or line.endswith((":", ",")):
        return None
    return line if is_request(line) and not echoes(line, persona) else None


def added_text(query: str, answer: str) -> str:
    """What an answer says beside the query: the answer without it, where it is repeated.

    >>> added_text("How do tides work?", "You asked: How do tides work?")
    'You asked:  ?'
    """
    asked, found = words_of(query), list(re.finditer(r"\w+", answer))
    words = [word[0].lower() for word in found]
    match = difflib.SequenceMatcher(None, asked, words, autojunk=False).find_longest_match()
    if match.size < max(2, 0.8 * len(asked)):
        return answer
    end = match.b + match.size - 1
    return f"{answer[:found[match.b].start()]} {answer[found[end].end():]}"


def degenerate(query: str, answer: str) -> bool:
    """Whether a text is no answer: empty, the query again with hardly a word around it, or a loop.
    A refusal that repeats the query says something: that it refuses.

    >>> degenerate("How do tides work?", "You asked: How do tides work?")
    True
    """
    words, added = words_of(answer), added_text(query, answer)
    fours = list(zip(words, words[1:], words[2:], words[3:]))
    loop = len(fours) >= 24 and len(set(fours)) < len(fours) / 2
    hardly = len(words_of(added)) <= max(3, len(words_of(query)) // 3)
    echo = added != answer and hardly and not refuses(added)
    return loop or echo or not words
