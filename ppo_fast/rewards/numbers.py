"""Mathematics: the number that an answer ends with, against the right one (Cobbe et al. 2021, GSM8K)."""

import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ppo_fast.rewards.matching import best_of

_SIGN = r"(?P<sign>(?<![\w)\]}])[-+])?"
_MONEY = r"(?:[$€£¥₹]\s?)?"
_DIGITS = r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_TEN = r"[eE](?P<e>[-+]?\d+)(?!\w)|\s*(?:\u00d7|\*|x)\s*10\^\{?(?P<ten>[-+]?\d+)\}?"
_NUMBER = re.compile(
    rf"{_SIGN}{_MONEY}(?<![A-Za-z\d_./^])(?:"
    rf"(?:(?P<whole>\d+)\s+)?(?P<top>\d+)/(?P<bottom>0*[1-9]\d*)(?![\d/])"  # 3/4, 1 1/2
    rf"|{_DIGITS}(?:{_TEN}|\^\{{?(?P<power>[-+]?\d+)\}}?)?)"  # 1,234.5, 2e-3, 2 x 10^3, 2^{{10}}
)
_FRACTION = re.compile(r"(\d\s*)?\\[dtc]?frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_LONGEST = 400  # characters of a number, and its largest power: a model may write anything


def numeric(
    prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[Any], *, tolerance: float = 0.0
) -> list[float]:
    """1 where an answer's number (`number_in`) is the reference's, else 0; an answer without a number is wrong.

    Args:
        prompts: [B], not looked at.
        completions: [B] answers.
        reference: [B] numbers, or texts such as GSM8K's answers, whose number counts, or lists of such.
        tolerance: how far they may be apart; 0: they must be equal, and are compared as fractions, not as floats.

    Raises:
        ValueError: an answer has no reference, a reference has no number, or the tolerance is none.

    >>> numeric(["6 * 7 * 1000?"] * 2, ["It is 42,000.0 dollars", "#### 42"], ["... #### 42000", 42.5], tolerance=0.1)
    [1.0, 0.0]
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"the tolerance must be a finite number, at least 0, got {tolerance}")
    allowed = Fraction(str(float(tolerance)))

    def right(answer: str, expected: Any) -> bool:
        wanted, found = number_in(str(expected)), number_in(answer)
        if wanted is None:
            raise ValueError(f"the reference {expected!r:.80} has no number")
        return found is not None and abs(found - wanted) <= allowed

    return best_of(completions, reference, right)


def number_in(text: str) -> Fraction | None:
    r"""The number after the last "####" (GSM8K's mark), else in the last \boxed{}, else the last of all; exactly.

    Thousands with commas or thin blanks, signs, currencies and units, decimals, powers of ten, fractions (3/4, 1 1/2,
    \frac{3}{4}) and digits of all scripts are read; a percentage counts as its number. None: there is no number.

    >>> number_in("so 3 + 4 = 7 apples, -$1,234.50 in all"), number_in(r"\boxed{\frac{1}{2}} of 10"), number_in("none")
    (Fraction(-2469, 2), Fraction(1, 2), None)
    """
    text = _plain(text)
    if "####" in text:
        found = _NUMBER.search(text.rpartition("####")[2])
    else:
        found = None
        for found in _NUMBER.finditer(_boxed(text)):  # noqa: B007  the last one is wanted
            pass
    return None if found is None else _value(found)


def _plain(text: str) -> str:
    """LaTeX and typography as plain characters."""
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)  # thin blanks between thousands
    text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # 2 and a half is not 21/2
    text = re.sub("[\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+", r"^\g<0>", text)  # nor 10 squared 102
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u066b", ".").replace("\u066c", ",")
    for latex, plain in {"{,}": ",", "\\,": "", "\\!": "", "\\$": "$", "\\times": "*", "\\cdot": "*"}.items():
        text = text.replace(latex, plain)
    text = re.sub("[\u2010-\u2013\u2212]", "-", text)
    text = re.sub(r"(?<!\d)\^(?:\{[^{}]*\}|[-+]?\d+)", "", text)  # of units and unknowns: cm^{2}, s^-1
    return _FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}", text)


def _boxed(text: str) -> str:
    """What stands in the last \\boxed{}, or the text itself."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found.group()) > _LONGEST:
        return None
    ten, power = int(found["e"] or found["ten"] or 0), int(found["power"] or 1)
    if max(abs(ten), abs(power)) > _LONGEST:
        return None
    if found["bottom"]:
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        base = Fraction(found["digits"].replace(",", "")) * Fraction(10) ** ten
        if base == 0 and power < 0:
            return None
        value = base**power
    return -value if found["sign"] == "-" else value
