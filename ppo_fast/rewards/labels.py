"""Classes, entities and rankings, each in about ten lines."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_fast.rewards.matching import best_of, normalised, overlap_f1


def label_match(
    prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[Any], *, labels: Sequence[str] = ()
) -> list[float]:
    """1 where an answer is the right label, else 0; with `labels`, where the first of them that it names is.

    Case, punctuation and articles don't count. Errors as for `exact_match`.

    >>> label_match(["Good film?"] * 2, ["It is good.", "bad"], ["good"] * 2, labels=["good", "bad"])
    [1.0, 0.0]
    """
    names = {normalised(label) for label in labels}
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def judge(answer: str, right: Any) -> bool:
        said = normalised(answer)
        if not names:
            return said == normalised(right)
        if normalised(right) not in names:
            raise ValueError(f"the reference {right!r} is not among the labels {', '.join(labels)}")
        first = re.search(rf"(?<!\w)(?:{longest_first})(?!\w)", said)
        return first is not None and first.group() == normalised(right)

    return best_of(completions, reference, judge)


def span_f1(prompts: Sequence[Any], completions: Sequence[str], reference: Sequence[Any]) -> list[float]:
    """Entity recognition: F1 of (label, text) pairs, both exact (Tjong Kim Sang and De Meulder 2003).

    Args:
        prompts: [B], not looked at.
        completions: [B] answers, a line "LABEL: text" for each entity; other lines count as wrong entities.
        reference: [B] texts of the same form, or dicts of label to list of texts. Without entities ("" or {}), the
            empty answer is right.

    >>> span_f1(["Tag: Ada met Bob in Rome."], ["PER: Ada\\nLOC: Rome"], [{"PER": ["Ada", "Bob"], "LOC": ["Rome"]}])
    [0.8]
    """
    return best_of(completions, reference, lambda answer, right: overlap_f1(_spans(answer), _spans(right)))


def _spans(entities: Any) -> list[tuple[str, str]]:
    if isinstance(entities, Mapping):
        return [(label.upper(), " ".join(text.split())) for label, texts in entities.items() for text in texts]
    lines = [line.partition(":") for line in entities.splitlines() if line.strip()]
    return [(label.strip(" -*").upper(), " ".join(text.split())) for label, _, text in lines]


def ndcg(prompts: Sequence[Any], completions: Sequence[str], relevance: Sequence[Any], *, k: int = 10) -> list[float]:
    """Recommendation: normalised discounted cumulative gain of the first k lines (Järvelin and Kekäläinen 2002).

    Gains are 2^relevance - 1, discounted by log2(1 + rank).

    Args:
        prompts: [B], not looked at.
        completions: [B] lists, an item a line, perhaps numbered or with bullets; a second mention counts nothing.
        relevance: [B] dicts of item to relevance (0 for all others), or lists of relevant items.
        k: lines that count.

    Raises:
        ValueError: nothing is relevant.

    >>> ndcg(["Films like Alien?"] * 2, ["1. Aliens\\n2. Heat", "- heat\\n- aliens"], [["Aliens"]] * 2)
    [1.0, 0.6309297535714575]
    """
    return [
        _ndcg(completion, gains, k, row)
        for row, (completion, gains) in enumerate(zip(completions, relevance, strict=True))
    ]


def _ndcg(completion: str, relevance: Any, k: int, row: int) -> float:
    graded = relevance if isinstance(relevance, Mapping) else dict.fromkeys(relevance or (), 1.0)
    gains = {normalised(item): 2.0**grade - 1 for item, grade in graded.items()}
    lines = [
        normalised(re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", line)) for line in completion.splitlines() if line.strip()
    ]
    best = sorted(gains.values(), reverse=True)[:k]
    ideal = sum(gain / math.log2(2 + rank) for rank, gain in enumerate(best))
    if ideal <= 0:
        raise ValueError(f"nothing is relevant to prompt {row}")
    return sum(gains.pop(item, 0.0) / math.log2(2 + rank) for rank, item in enumerate(lines[:k])) / ideal
