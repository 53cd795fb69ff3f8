"""Which control tokens of a rendering are the template's own, and which a text only spells.

Each control token has a private character, its mark, and two swaps of one for the other keep the
two kinds apart. Before a text goes through a template, the control tokens that it spells become
marks, which no template can cut in two. In the rendering, the control tokens left are the
template's: they become marks, and the marks become what the text spelled. The result is tokenized
as a whole, with marks as added tokens and control tokens as plain characters.
"""

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
        marks = [chr(LAST_PRIVATE - i) for i in range(len(control))]
        self.spelled = any_of(control)
        # In two groups: the first then keeps a beginning that all control tokens share.
        self._either = re.compile(f"(?:{self.spelled.pattern})|(?:{any_of(marks).pattern})")
        self._other = dict(zip([*control, *marks], [*marks, *control]))
        self._taken = str.maketrans(dict.fromkeys(marks, "\ufffd"))
        self._needed: set[str] = set()  # characters without which there is no control token
        known, plain, added = tokenizer.get_added_tokens_decoder(), [], []
        for text, mark in zip(control, marks):
            like, first = known[control[text]], text.strip()[:1]
            self._needed |= {first, first.lower(), first.upper()} - {""}
            self._needed |= {c for c in text if not (c.isalnum() or c.isspace() or c in "/_")}
            plain.append(AddedToken(text, normalized=False))
            added.append(AddedToken(mark, normalized=False, lstrip=like.lstrip, rstrip=like.rstrip))
        tokenizer.add_special_tokens(plain)
        size = tokenizer.get_vocab_size()
        if any(map(tokenizer.id_to_token, range(size, size + len(added)))):
            raise InputError(f"{folder}: tokenizer.json leaves out ids below its largest, so that "
                             "a new token would get the id of another")
        tokenizer.add_tokens(added)
        self.ids = dict(zip(map(tokenizer.token_to_id, marks), control.values()))

    def swap(self, text: str) -> str:
        """A text with marks for its control tokens, and control tokens for its marks."""
        return self._either.sub(lambda found: self._other[found.group()], text)

    def plain(self, text: str) -> str:
        """What somebody says, without the characters that are marks here."""
        return text.translate(self._taken)

    def guard(self, text: str) -> str:
        """What somebody says, for the template. (One that escapes a mark, as by
        tojson(ensure_ascii=True), leaves the escape in the text.)"""
        return self.swap(self.plain(text))

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
