"""Question answering: exact match and F1 of words, after SQuAD's normalisation (Rajpurkar et al. 2016, section 6.1)."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Entry = TypeVar("Entry")


def rows_of(completions: Sequence[str], column: Sequence[Entry]) -> Iterator[tuple[int, str, Entry]]:
    """Iterate over row, answer, and the entry of the column for it.

    Raises:
        ValueError: the column does not have one entry for each answer.
    """
    if isinstance(column, str):
        raise ValueError(
            f"one entry for each answer is expected, got the text {column!r:.80}; the name of a column has no"
            " quotation marks"
        )
    if len(column) != len(completions):
        raise ValueError(f"a column has {len(column)} entries for {len(completions)} answers")
    return ((row, completions[row], column[row]) for row in range(len(completions)))


def references_of(reference: object, row: int, also: tuple[type, ...] = ()) -> list[object]:
    """Return the references of one answer as a list; the best of them counts.

    Raises:
        ValueError: there is none (None, or the NaN of a table), or it is neither text nor number nor one of `also`.
    """
    found = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not found or any(x is None or (isinstance(x, float) and math.isnan(x)) for x in found):
        raise ValueError(f"answer {row} has no reference")
    for x in found:
        if isinstance(x, Iterable) and not isinstance(x, (str, *also)):
            raise ValueError(f"the reference of answer {row} must be a text, a number or a list of such, got {x!r:.80}")
    return found


def best_of(
    completions: Sequence[str],
    reference: Sequence[object],
    compare: Callable[[str, object], float],
    also: tuple[type, ...] = (),
) -> list[float]:
    """Score each completion against the reference with the highest score."""
    return [
        max(float(compare(completion, right)) for right in references_of(rights, row, also))
        for row, completion, rights in rows_of(completions, reference)
    ]


def words(text: str) -> list[str]:
    """Split into runs of letters, digits and their marks (accents, vowel signs) of any script, in lower case.

    >>> words("It's the Zu\u0308rich_lake")
    ['it', 's', 'the', 'zürich', 'lake']
    """
    text = unicodedata.normalize("NFC", text).lower()
    runs = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split()
    return [run for run in runs if any(map(str.isalnum, run))]  # no lone mark, such as an emoji's


def normalised(text: object) -> str:
    """Convert to lower case without punctuation, the articles a, an, the, and superfluous blanks.

    For ASCII the result is that of SQuAD's own script. Punctuation of other scripts is removed, too, and composed and
    decomposed letters are equal.

    >>> normalised("The  Eiffel Tower!")
    'eiffel tower'
    """
    text = unicodedata.normalize("NFKC", str(text)).lower()
    text = "".join(c for c in text if not is_mark(c))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_mark(c: str) -> bool:
    """Check for punctuation of any script, or one of ASCII's symbols."""
    return c in _ASCII_MARKS or unicodedata.category(c).startswith("P")


_ASCII_MARKS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def exact_match(prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object]) -> list[float]:
    """Return 1 where the normalised answer is the normalised reference, else 0.

    Args:
        prompts: [B], not used.
        completions: [B] answers.
        reference: [B] texts, or lists of texts of which one must match. "" is right for an empty answer (SQuAD 2.0),
            and so is an article alone: for the choices A, B, C use `label_match`.

    Raises:
        ValueError: an answer has no reference.

    >>> exact_match(["Capital of France?"] * 2, ["The city of Paris.", "Paris!"], ["Paris", ["Paris", "Lutetia"]])
    [0.0, 1.0]
    """
    return best_of(completions, reference, lambda answer, right: normalised(answer) == normalised(right))


def f1(prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object]) -> list[float]:
    """Return the harmonic mean of precision and recall of the normalised words (Rajpurkar et al. 2016).

    Arguments and errors as for `exact_match`. Languages that don't write blanks between words get exact match.

    >>> f1(["Capital of France?"], ["the city of Paris"], ["Paris"])
    [0.5]
    """
    return best_of(
        completions,
        reference,
        lambda answer, right: overlap_f1(normalised(answer).split(), normalised(right).split()),
    )


def overlap_f1(found: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Compute the F1 of two multisets; 1 if both are empty, 0 if only one is.

    >>> overlap_f1(["city", "paris"], ["paris"])
    0.6666666666666666
    """
    if not found or not right:
        return float(len(found) == len(right))
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))
