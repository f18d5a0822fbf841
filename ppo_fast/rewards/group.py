"""Rewards that compare the samples of one prompt: diversity."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from ppo_fast.rewards.dialogue import ngrams


def group_diversity(prompts: Sequence[object], completions: Sequence[str], *, n: int = 2) -> list[float]:
    """Return the share of an answer's distinct word n-grams that no other answer to the same prompt has.

    For `samples_per_prompt` > 1: a prompt's only answer gets 1, and so nothing is learned from it. An answer of fewer
    than n words counts as one n-gram; two empty ones are the same.

    >>> group_diversity(["p", "p", "q"], ["a red fox", "a red hen", "a red fox"])
    [0.5, 0.5, 1.0]
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[json.dumps(prompt)].append(row)
    words = [completion.lower().split() for completion in completions]
    grams = [set(ngrams(some, n)) or {tuple(some)} for some in words]
    found = [1.0] * len(grams)
    for rows in groups.values():
        owners = Counter(gram for row in rows for gram in grams[row])
        for row in rows:
            found[row] = sum(owners[gram] == 1 for gram in grams[row]) / len(grams[row])
    return found
