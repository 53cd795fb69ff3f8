"""The number that an answer ends with, in the forms in which people and models write numbers.

What can be read in two ways (a range, a ratio, a date, a power, a comma that may be either sign) is
no number here, so that nothing is scored on a guess.
"""

import re
import unicodedata
from fractions import Fraction

SPACES = "\u00a0\u2009\u202f"  # spaces that group digits; an ordinary one parts two numbers
# LaTeX and typography -> plain signs.
REWRITES = (
    (r"\{,\}", ","), (r"\\[,;:!]|\\ (?=\d{3})", "\u202f"), (r"\\([$%])", r"\1"),
    (r"\\[()\[\]]|\*\*", " "),
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "), (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2"), (r"\\(?:text|math)\w*", " "), ("\u2044", "/"),
    (r"\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*\^\s*\{?\s*([-\u2212]?\d+)\s*\}?", r"e\1"),
    (r"(?<=[A-Za-z}])\s*\^\s*\{?\d\}?", ""),  # of a unit, as in cm^2
    ("\u2212", "-"), (r"(?<![^\s=(])\u2013(?=[\d.$])", "-"), (r"[{}]", " "),
    (r"(?<!\d)(?<!\d )\b(?:minus|negative) (?=[\d.$])", "-"))
VULGAR = "[\u00bc-\u00be\u2150-\u215e]"  # one half and the like, each a character of its own
MONEY = "[$\u20ac\u00a3\u00a5]"
NUMBER = re.compile(rf"""
    (?P<sign>(?<![\w.)%\]])-)?(?:{MONEY}\s?(?P<later>-)?)?
    (?: (?:(?P<whole>\d+)\ )?(?P<top>\d+)\ ?/\ ?(?P<bottom>\d+)(?![\d/])
      | (?P<digits>\d[\d.,'\u2019_{SPACES}]*\d|\d|(?<!\w)\.\d+)(?:e(?P<power>-?\d{{1,3}})(?!\d))?
        (?P<word>\s?(?:thousand|million|billion)\b|k\b)?)""", re.IGNORECASE | re.VERBOSE)
PLAIN = re.compile(r"\d+|\d*\.\d+"
                   rf"|\d{{1,3}}([,'\u2019_{SPACES}])\d{{3}}(?:\1\d{{3}})*(?:\.\d+)?"
                   r"|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")  # the last is how India groups
GERMAN = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+")
TIMES = {"": 1, "k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Ends what stands before a number, if both are a range, a ratio, a power, a choice, or it a root.
UNCLEAR = re.compile(r"(?:\d[%\u00b0]?(?:[:^/]| +: *| *(?:[-\u2013\u2014~]| to| or| and)? *)"
                     r"|[\u00b1\u221a] *|\+/)$")
UNKNOWN = re.compile(r"\s?(?:hundred|dozen|trillion)\b|(?:M|B|bn|mn)\b")  # a multiplier behind it
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
MARKED = re.compile(r"^#{4}\s*(\S*\d\S*)\s*$", re.MULTILINE)  # as GSM8K's answers end


def last_number(answer: str) -> Fraction | None:
    """The number that a text ends with: marked by "####", in a LaTeX box, or simply the last one;
    None if there is none, or if it can be read in two ways.

    >>> last_number("So 3 boxes cost $1,250.50."), last_number("It takes 3-4 days.")
    (Fraction(2501, 2), None)
    """
    text = (MARKED.findall(answer) or BOXED.findall(answer) or [answer])[-1]
    text = re.sub(VULGAR, lambda sign: " " + unicodedata.normalize("NFKC", sign[0]), text)
    for pattern, sign in REWRITES:
        text = re.sub(pattern, sign, text)
    found = list(NUMBER.finditer(text))
    if not found or UNCLEAR.search(text[:found[-1].start()]):
        return None
    after = text[found[-1].end():]
    if UNKNOWN.match(after):
        return None
    if after and unicodedata.category(after[0]) == "No":  # 10 to the power of a raised digit
        return None
    try:
        return value_of(found[-1])
    except (ValueError, ZeroDivisionError):
        return None


def value_of(number: re.Match) -> Fraction | None:
    """What a match of NUMBER is worth; None where its commas and points have no one reading."""
    if number["bottom"]:
        value = int(number["whole"] or 0) + Fraction(int(number["top"]), int(number["bottom"]))
    else:
        digits = number["digits"]
        if GERMAN.fullmatch(digits):
            digits = digits.replace(".", "").replace(",", ".")
        elif not PLAIN.fullmatch(digits):
            return None
        value = Fraction(re.sub(rf"[,'\u2019_{SPACES}]", "", digits))
        value *= TIMES[(number["word"] or "").strip().lower()]
        value *= Fraction(10) ** int(number["power"] or 0)
    return -value if number["sign"] or number["later"] else value
