"""Classes, entities and rankings, each in about ten lines."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from ppo_fast.rewards.matching import best_of, is_mark, normalised, overlap_f1, rows_of

Relevance = Mapping[str, float | None] | Sequence[str] | None  # of items, or the relevant items


def label_match(
    prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object], *, labels: Sequence[str] = ()
) -> list[float]:
    """Return 1 for the right label, else 0; with `labels`, the first of them in the answer is compared.

    Case and punctuation are ignored. A label is found between blanks or punctuation; A also where it is an article.

    Raises:
        ValueError: an answer has no reference, or one that is no label; or two labels are the same.

    >>> label_match(["Good film?"] * 2, ["It is good.", "bad"], ["good"] * 2, labels=["good", "bad"])
    [1.0, 0.0]
    """
    names = {_plain(label) for label in labels}
    if isinstance(labels, str) or "" in names or len(names) < len(labels):
        raise ValueError(f"labels must be a list of texts that differ in their letters or digits, got {labels!r:.200}")
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def is_right(answer: str, right: object) -> bool:
        said, wanted = _plain(answer), _plain(right)
        if not names:
            return (said or answer.strip()) == (wanted or str(right).strip())
        if wanted not in names:
            raise ValueError(f"the reference {right!r} is not among the labels {', '.join(map(str, labels))}")
        first = re.search(rf"(?<!\w)(?:{longest_first})(?!\w)", said)
        return first is not None and first.group() == wanted

    return best_of(completions, reference, is_right)


def _plain(text: object) -> str:
    """Convert to lower case, with blanks for punctuation; articles stay, since A may be a label."""
    text = unicodedata.normalize("NFKC", str(text)).lower()
    return " ".join("".join(" " if is_mark(c) else c for c in text).split())


def span_f1(prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object]) -> list[float]:
    """Return the F1 of exact (label, text) pairs, for entity recognition (Tjong Kim Sang and De Meulder 2003).

    Args:
        prompts: [B], not used.
        completions: [B] answers, a line "LABEL: text" for each entity; other lines count as wrong entities.
        reference: [B] texts of the same form, or dicts of label to list of texts. Without entities ("" or {}), the
            empty answer is right.

    >>> span_f1(["Tag: Ada met Bob in Rome."], ["PER: Ada\\nLOC: Rome"], [{"PER": ["Ada", "Bob"], "LOC": ["Rome"]}])
    [0.8]
    """
    return best_of(completions, reference, lambda answer, right: overlap_f1(_spans(answer), _spans(right)), (Mapping,))


def _spans(entities: object) -> list[tuple[str, str]]:
    if isinstance(entities, Mapping):
        several = {label: [texts] if isinstance(texts, str) else texts or () for label, texts in entities.items()}
        return [(label.upper(), " ".join(text.split())) for label, texts in several.items() for text in texts]
    lines = [line.partition(":") for line in str(entities).splitlines() if line.strip()]
    return [(label.strip(" -*").upper(), " ".join(text.split())) for label, _, text in lines]


def ndcg(
    prompts: Sequence[object], completions: Sequence[str], relevance: Sequence[Relevance], *, k: int = 10
) -> list[float]:
    """Return the normalised discounted cumulative gain of the first k lines (Järvelin and Kekäläinen 2002).

    Gains are 2^relevance - 1, discounted by log2(1 + rank).

    Args:
        prompts: [B], not used.
        completions: [B] lists, an item a line, perhaps numbered or with bullets; a second mention counts nothing.
        relevance: [B] dicts of item to relevance (0, or None, for all others), or lists of relevant items.
        k: number of lines that are evaluated, at least 1.

    Raises:
        ValueError: nothing is relevant, or a relevance is negative or no number.

    >>> ndcg(["Films like Alien?"] * 2, ["1. Aliens\\n2. Heat", "- heat\\n- aliens"], [["Aliens"]] * 2)
    [1.0, 0.6309297535714575]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return [_ndcg(completion, gains, k, row) for row, completion, gains in rows_of(completions, relevance)]


def _ndcg(completion: str, relevance: Relevance, k: int, row: int) -> float:
    items = [relevance] if isinstance(relevance, str) else relevance or ()
    graded: Mapping[str, float | None] = dict.fromkeys(items, 1.0)
    if isinstance(relevance, Mapping):
        graded = relevance
    for item, grade in graded.items():
        if grade is not None and not (isinstance(grade, float | int) and 0 <= grade <= 100):
            raise ValueError(f"the relevance of {item!r} to prompt {row} must be in [0, 100], got {grade!r}")
    gains = {normalised(item): 2.0 ** (grade or 0) - 1 for item, grade in graded.items()}
    lines = [
        normalised(re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", line)) for line in completion.splitlines() if line.strip()
    ]
    best = sorted(gains.values(), reverse=True)[:k]
    ideal = sum(gain / math.log2(2 + rank) for rank, gain in enumerate(best))
    if ideal <= 0:
        raise ValueError(f"nothing is relevant to prompt {row}")
    return sum(gains.pop(item, 0.0) / math.log2(2 + rank) for rank, item in enumerate(lines[:k])) / ideal
