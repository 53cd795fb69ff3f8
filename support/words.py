"""Words of texts in any language, what a query has to look like, and the lists in support/data/."""

import difflib
import re
from pathlib import Path
from typing import Iterable

from support.refusals import refuses

MIN_WORDS, MAX_WORDS = 5, 60  # of a query
ECHO_WORDS = 5  # a text that repeats so many words of another in a row is an echo
SHARED, FEWEST_WORDS = 0.1, 12  # see `shares_language`
NEAR_DUPLICATE = 0.7  # Jaccard similarity of word sets from which two queries count as one
UNSPACED = "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"  # Thai, Japanese and Chinese characters
WORD = rf"{UNSPACED}|(?:(?!{UNSPACED})\w)+"
QUOTES = ('""', "\u201c\u201d", "\u201e\u201c", "\u00ab\u00bb", "\u300c\u300d")
CUT_OFF = (":", ",", "\uff1a", "\uff0c")  # what such a line announces, or goes on with, is missing
# see `degenerate`: share of the query that an echo repeats, words it may add, length of a loop
REPEATED, MOST_ADDED, LOOP = 0.8, 3, 24


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


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; in scripts that do not separate words
    each character is one.

    >>> words_of("What, then? \u6f6e\u6c50")
    ['what', 'then', '\u6f6e', '\u6c50']
    """
    return re.findall(WORD, text.lower())


def shares_language(text: str, others: Iterable[str]) -> bool:
    """Whether a text has at least SHARED of its words in common with others; one of fewer than
    FEWEST_WORDS is too short to tell, and passes.

    >>> english = ["Who are you, and what is your name?"]
    >>> shares_language("You are the cook who is proud of what you do and eat.", english)
    True
    >>> shares_language("Du bist Koch und sagst mir heute Abend zwei oder drei Rezepte.", english)
    False
    """
    known = {word for other in others for word in words_of(other)}
    words = [word for word in words_of(text) if len(word) > 1 or not word.isascii()]
    return len(words) < FEWEST_WORDS or sum(w in known for w in words) >= SHARED * len(words)


def near_duplicates(one: set[str], other: set[str]) -> bool:
    """Whether two sets of words count as one query."""
    return len(one & other) >= NEAR_DUPLICATE * len(one | other)


def echoes(text: str, source: str) -> bool:
    """Whether a text repeats ECHO_WORDS words of its source in a row."""
    words = words_of(text)
    match = difflib.SequenceMatcher(None, words, words_of(source), False).find_longest_match()
    return count_words(" ".join(words[match.a:match.a + match.size])) >= ECHO_WORDS


def clean_query(text: str, *sources: str) -> str | None:
    """First non-empty line without list numbering or surrounding quotes; None if it is too short,
    too long or cut off (by its last character), or repeats a run of ECHO_WORDS words of a source.

    >>> clean_query('1. "How do tides work in a bay?"')
    'How do tides work in a bay?'
    """
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    line = re.sub(r"^(?:\d{1,2}[.)]|[-*])\s+", "", line).strip()
    if len(line) > 1 and line[0] + line[-1] in QUOTES:
        line = line[1:-1].strip()
    if not MIN_WORDS <= count_words(line) <= MAX_WORDS or line.endswith(CUT_OFF):
        return None
    return None if any(echoes(line, source) for source in sources) else line


def added_text(query: str, answer: str) -> str:
    """What an answer says beside the query: the answer without it, where it is repeated.

    >>> added_text("How do tides work?", "You asked: How do tides work?")
    'You asked:  ?'
    """
    asked, found = words_of(query), list(re.finditer(WORD, answer))
    words = [word[0].lower() for word in found]
    match = difflib.SequenceMatcher(None, asked, words, autojunk=False).find_longest_match()
    if match.size < max(2, REPEATED * len(asked)):
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
    loop = len(fours) >= LOOP and len(set(fours)) < len(fours) / 2
    hardly = len(words_of(added)) <= max(MOST_ADDED, len(words_of(query)) // 3)
    echo = added != answer and hardly and not refuses(added)
    return loop or echo or not words
