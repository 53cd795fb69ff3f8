"""Which control tokens of a rendering are the template's own, and which a text only spells.

Before a text goes through a template, each control token that it spells becomes one private
character, which no template can cut in two (`guard`). In the rendering, the control tokens left are
the template's: each becomes another private character, its mark, and what a text spells is spelled
again (`mark`). The result is tokenized as a whole, with marks as added tokens and control tokens as
plain characters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterable
from unicodedata import normalize

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from support.hub import InputError

LAST_PRIVATE = 0x10fffd  # from this character on downwards, texts have no use for them


class Marks:
    """The marks of a tokenizer's control tokens {text: id}; they are added to the tokenizer.

    `ids`: a mark's id -> its control token's; `spelled` finds control tokens in a text.

    Raises:
        InputError: there are ids above those that the vocabulary would give to a new token.
    """

    def __init__(self, tokenizer: FastTokenizer, control: dict[str, int], folder: Path):
        self.spelled = any_of(control)
        self._marks: dict[str, str] = {}  # control token -> its mark
        self._guards: dict[str, str] = {}  # control token -> what stands for a spelled one
        self._needed: set[str] = set()  # characters without which there is no control token
        known, tokens, marks = tokenizer.get_added_tokens_decoder(), [], []
        for i, (text, number) in enumerate(control.items()):
            mark, guard = chr(LAST_PRIVATE - 2 * i), chr(LAST_PRIVATE - 2 * i - 1)
            self._marks[text], self._guards[text] = mark, guard
            like, first = known[number], text.strip()[:1]
            self._needed |= {first, first.lower(), first.upper()} - {""}
            self._needed |= {c for c in text if not (c.isalnum() or c.isspace() or c in "/_")}
            tokens.append(AddedToken(text, normalized=False))
            marks.append(AddedToken(mark, normalized=False, lstrip=like.lstrip, rstrip=like.rstrip))
        self._guarded = {ord(guard): text for text, guard in self._guards.items()}
        private = (*self._marks.values(), *self._guards.values())
        self._taken = dict.fromkeys(map(ord, private), "\ufffd")
        tokenizer.add_special_tokens(tokens)
        size = tokenizer.get_vocab_size()
        if any(map(tokenizer.id_to_token, range(size, size + len(marks)))):
            raise InputError(f"{folder}: tokenizer.json leaves out ids below its largest, so that "
                             "a new token would get the id of another")
        tokenizer.add_tokens(marks)
        self.ids = {}
        for text, mark in self._marks.items():
            self.ids[tokenizer.token_to_id(mark)] = control[text]

    def plain(self, text: str) -> str:
        """A text without those private characters, which would pass for control tokens."""
        return text.translate(self._taken)

    def guard(self, text: str) -> str:
        """A text for the template, a private character in place of each control token. (A template
        that escapes it, as by tojson(ensure_ascii=True), leaves the escape in the text.)"""
        return self.spelled.sub(lambda found: self._guards[found.group()], self.plain(text))

    def mark(self, text: str) -> str:
        """A rendering with marks for the template's control tokens, those of texts spelled."""
        text = self.spelled.sub(lambda found: self._marks[found.group()], text)
        return text.translate(self._guarded)

    def disarm(self, text: str) -> str:
        """A text without the characters that control tokens begin with, in any case, and without
        their punctuation, but for what switches such as /no_think need, so that a template mostly
        treats it alike."""
        table = {}
        for c in set(text):
            if not self._needed.isdisjoint(normalize("NFKC", c)):
                table[ord(c)] = "\ue002"
        return text.translate(table)


def any_of(texts: Iterable[str]) -> re.Pattern:
    """An expression that finds these texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
