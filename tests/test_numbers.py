"""support/numbers.py: the number at the end of an answer, as people and models write it."""

from fractions import Fraction

import pytest

from support.numbers import last_number

FORMS = {
    # signs, decimals, groups
    "It is 12.": 12, "\u22123 degrees": -3, "\u20133": -3, "x=-3": -3, "3 + 4 = 7, so 7.0": 7,
    "7.": 7, "-.5": "-0.5", "1,250.50": "1250.5", "1,000,000": 10**6, "1,25,000": 125000,
    "1'250": 1250, "1\u2019250": 1250, "1_250": 1250, "1\u00a0250": 1250, "1.250,50": "1250.5",
    "1.250": "1.25", "\u0661\u0662": 12, "007": 7, "5 (five)": 5, "3rd": 3, "COVID-19": 19,
    "minus 5": -5, "negative 5": -5, "8 minus 5": 5, r"5\ 000": 5000,
    "a 10-year-old": 10, "Step 3: 18": 18, "3, 4": 4, "- 5": 5, "**18**": 18, "<<3*4=12>>12": 12,
    # money, per cent, words
    "$1,250.50 in all": "1250.5", "-$5": -5, "$-5": -5, "5 \u20ac": 5, "\u00a3 1,250": 1250,
    "Rs.5": 5, "12.5 %": "12.5", "- $5": 5, "$1.2 million": 12 * 10**5, "5k": 5000, "5 km": 5,
    "1.5e-3": "0.0015", "25 cm^2": 25, "25 m\u00b2": 25,
    # fractions
    "3/4": "3/4", "-1 1/2": "-3/2", "2\u00bd": "5/2", "8 / 10": "4/5", "1\u20442": "1/2",
    # LaTeX
    r"\boxed{42}, checked in 2 ways": 42, r"\boxed{1} then \boxed{2}": 2, r"$\boxed{-7}$": -7,
    r"\boxed{3\frac{1}{2}}": "7/2", r"-\dfrac{1}{2}": "-1/2", r"\frac12": "1/2", r"\(18\)": 18,
    r"\boxed{1{,}250}": 1250, r"\boxed{1\,250}": 1250, r"\boxed{\$18}": 18, r"\boxed{50\%}": 50,
    r"\boxed{x = 5 \text{ cm}^2}": 5, r"3 \times 10^5": 3 * 10**5, "3 \u00d7 10^{-2}": "0.03",
    r"\boxed{\text{\textbf{6}}}": 6,
    # GSM8K's own mark, and a heading that is none
    "#### 18\n\nQuestion 5": 18, "####1,000": 1000, "#### Step 1: add\n\n18": 18, "#### -3": -3,
    # no number, or more than one reading
    "": None, "none": None, "3-4 days": None, "3 - 4": None, "3\u20134": None, "$3-$4": None,
    "10% - 20%": None, "3 to 4": None, "7 or 8": None, "5 -3": None, "3:30": None, "12,5": None,
    "3/4/2020": None, "2020-01-05": None, "3.11.2": None, "1,2,3": None, "1,250,50": None,
    "5\u00b11": None, "+/-5": None, "\u221a9": None, "3 : 2": None, "7 hundred": None, "$3M": None,
    "between 3 and 4": None, r"\boxed{3 \text{ or } 4}": None, "3 trillion": None,
    "1 250": None, "10^5": None, "10\u2075": None, "2/0": None, "9" * 5000: None}


@pytest.mark.parametrize(("answer", "expected"), FORMS.items(), ids=[a[:20] for a in FORMS])
def test_a_form_of_a_number_is_misread(answer: str, expected: int | str | None) -> None:
    """As a reader would say it; what has two readings is no answer, whichever would be right."""
    assert last_number(answer) == (None if expected is None else Fraction(expected))
    if answer not in ("", "none") and "####" not in answer:
        assert last_number(f"There are 99 of them. So {answer}") == last_number(answer)
