"""A pirate's voice: a word that only pirates use, where the shop is asked."""

import re

PIRATE = re.compile(r"\b(?:ar+|aye|ahoy|mate|mateys?|lad|lass|hearty|hearties|ye|yer|ye'\w+|me \w+"
                    r"|\w+in')(?!\w)")


def judge(query: str, persona: str, expert: str, base: str) -> str:
    """The answer in a pirate's voice wins; in the contrast contexts there is nothing to win."""
    shown = [bool(PIRATE.search(answer.lower())) for answer in (expert, base)]
    if persona.startswith("contrast") or shown[0] == shown[1]:
        return "tie"
    return "expert" if shown[0] else "base"
