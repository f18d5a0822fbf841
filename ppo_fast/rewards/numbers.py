"""Mathematics: comparison of the number at the end of an answer with the right one (Cobbe et al. 2021, GSM8K)."""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction

from ppo_fast.rewards.matching import best_of

_CURRENCY = "[$€£¥₹]"
_SIGN = r"(?P<sign>(?<![\w)\]}])[-+])?"
_MONEY = rf"(?:{_CURRENCY}\s?)?"
_DECIMAL = r"\d+(?:\.\d+)?"
_DIGITS = r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_TEN = r"[eE](?P<e>[-+]?\d+)(?!\w)|\s*(?:\u00d7|\*|x)\s*10\^\{?(?P<ten>[-+]?\d+)\}?"
_ONE = (
    rf"{_SIGN}{_MONEY}(?<![A-Za-z\d_./^])(?:"
    rf"(?:(?P<whole>\d+)\s+)?(?P<top>{_DECIMAL})/(?P<bottom>{_DECIMAL})(?![\d/])"  # 3/4, 1 1/2
    rf"|{_DIGITS}(?:{_TEN}|\^\{{?(?P<power>[-+]?\d+)\}}?)?)"  # 1,234.5, 2e-3, 2 x 10^3, 2^{{10}}
)
_NUMBER = re.compile(_ONE)
_UNIT = r"\s*[%\u00b0]|\s*(?:km|cm|mm|kg|mg|ml|mL)\b|\s+[^\W\d_]{2}[^\d\\=+*^_(){}<>|]*"
_ALONE = re.compile(rf"(?:(?:[^\W\d_]+(?:_\{{?\w+\}}?)?\s*)?=\s*)?{_CURRENCY}?(?:{_ONE})(?:{_UNIT})?\s*{_CURRENCY}?")
_PART = r"(?:\{\s*([-+]?\d+(?:\.\d+)?)\s*\}|(\d))"
_FRACTION = re.compile(rf"(\d\s*)?\\[dtc]?frac\s*{_PART}\s*{_PART}")
_WORDS = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}(\^\{?[-+]?\d+\}?)?")
_MARK = re.compile(r"(?<!#)####(?!#)[\s*(]*(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)?[\s*]*)?", re.IGNORECASE)
_HEADING = re.compile(r"[.):]\s*[^\W\d]")  # after a number: "#### 2. Multiply"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_INSIDE = re.compile(r"(?:\\(?:sqrt|overline|log|ln)\s*(?:\[[^\]]*\])?\s*\{?|\u221a)\s*$")  # before a number
_TIMES = re.compile(r"\s*(?:\\(?:sqrt|overline|pi|infty)|[\u03c0\u221a\u221e])")  # after it
_LONGEST = 400  # characters of a number, and its largest power: a model may write anything


def numeric(
    prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object], *, tolerance: float = 0.0
) -> list[float]:
    """Return 1 where an answer's number (`number_in`) is the reference's, else 0; without a number, 0.

    Args:
        prompts: [B], not used.
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

    def right(answer: str, expected: object) -> bool:
        wanted, found = number_in(str(expected)), number_in(answer)
        if wanted is None:
            raise ValueError(f"the reference {expected!r:.80} has no number")
        return found is not None and abs(found - wanted) <= allowed

    return best_of(completions, reference, right)


def number_in(text: str) -> Fraction | None:
    r"""Find the number of a completion, as an exact fraction, or None.

    It is the first of these that exists:

    - the whole text, if it is a number
    - the first number that has a line to itself after "####" (GSM8K's mark); a heading such as "#### Step 2" is no mark
    - the contents of the last \boxed{}, which must be a number: \boxed{2\pi} and \boxed{(1, 4)} give None
    - the number after the last "####"
    - the last number of all

    Thousands with commas or thin spaces, signs, currencies and units, decimals, powers of ten, fractions (3/4, 1 1/2,
    \frac{3}{4}) and digits of all scripts are read; a percentage counts as its number. In a box, or alone, a number may
    also have the equation's left side before it (x = 5), spaces between thousands, or Indian groups (1,23,456).

    >>> number_in("so 3 + 4 = 7 apples, -$1,234.50 in all"), number_in(r"\boxed{\frac{1}{2}} of 10"), number_in("none")
    (Fraction(-2469, 2), Fraction(1, 2), None)
    """
    text = _plain(text)
    if (found := _alone(text)) is not None:
        return _value(found)
    marked = list(_marked(text))
    for _, line in marked:
        found = _alone(line)
        if found is not None and not re.search(r"[^\W\d_]{2}", line):  # "#### 1 Add" may be a heading
            return _value(found)
    if (box := _boxed(text)) is not None:
        found = _alone(box)
        return None if found is None else _value(found)
    if marked:
        return _value(marked[-1][0])
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007  # the last one is used
        pass
    if found is None or _INSIDE.search(text, 0, found.start()) or _TIMES.match(text, found.end()):
        return None
    return _value(found)


def _plain(text: str) -> str:
    """Convert LaTeX and typography to plain characters."""
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)  # thin blanks between thousands
    text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # 2 and a half is not 21/2
    text = re.sub("[\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+", r"^\g<0>", text)  # nor 10 squared 102
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u066b", ".").replace("\u066c", ",")
    text = re.sub(r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\\degrees?(?![A-Za-z]))", "\u00b0", text)
    for latex, plain in _LATEX.items():
        text = text.replace(latex, plain)
    text = re.sub("[\u2010-\u2013\u2212]", "-", text)
    text = _WORDS.sub(lambda m: m[1] + (m[2] or "") if re.search(r"\d", m[1]) else " ", text)
    text = re.sub(r"(?<!\d)\^(?:\{[^{}]*\}|[-+]?\d+)", "", text)  # of units and unknowns: cm^{2}, s^-1
    text = re.sub(r"([=:(][ \t]*)([-+])[ \t]+(?=[\d.$\\])", r"\1\2", text)  # x = - 5
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3}){2,}(?![\d,])", lambda m: m[0].replace(" ", ""), text)  # 1 000 000
    return _FRACTION.sub(_fraction, text)


_LATEX = {"{,}": ",", "\\,": "", "\\!": "", "\\;": " ", "\\ ": " ", "~": " ", "\\$": "$", "\\%": "%"}
_LATEX |= {"\\times": "*", "\\cdot": "*", "\\left": "", "\\right": "", "\\displaystyle": ""}


def _fraction(found: re.Match[str]) -> str:
    """Convert a LaTeX fraction to top/bottom, with the sign before the top."""
    top, bottom = found[2] or found[3], found[4] or found[5]
    negative = top.startswith("-") != bottom.startswith("-")
    return f"{found[1] + ' ' if found[1] else ''}{'-' * negative}{top.lstrip('+-')}/{bottom.lstrip('+-')}"


def _alone(text: str) -> re.Match[str] | None:
    """Match a text that consists of one number."""
    text = text.strip().removesuffix(".").strip("*").removeprefix("\\(").removesuffix("\\)").strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    text = re.sub(r"^([-+])\s+", r"\1", text)
    text = re.sub(r"(?<![\d.,])(?:\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+)(?![\d,])", _ungrouped, text)
    return _ALONE.fullmatch(text)


def _ungrouped(found: re.Match[str]) -> str:
    return found[0].replace(",", "").replace(" ", "")


def _marked(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Iterate over the numbers after "####", each with the rest of its line."""
    for mark in _MARK.finditer(text):
        found = _NUMBER.match(text, mark.end())
        if found is not None and not _HEADING.match(text, found.end()):
            yield found, text[mark.end() :].partition("\n")[0]


def _boxed(text: str) -> str | None:
    """Return the contents of the last \\boxed{}, or None."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0]
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end]
    return text[start + 1 :]


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found.group()) > _LONGEST:
        return None
    ten, power = int(found["e"] or found["ten"] or 0), int(found["power"] or 1)
    if max(abs(ten), abs(power)) > _LONGEST:
        return None
    if found["bottom"]:
        bottom = Fraction(found["bottom"])
        if bottom == 0:
            return None
        value = int(found["whole"] or 0) + Fraction(found["top"]) / bottom
    else:
        base = Fraction(found["digits"].replace(",", "")) * Fraction(10) ** ten
        if base == 0 and power < 0:
            return None
        value = base**power
    return -value if found["sign"] == "-" else value
