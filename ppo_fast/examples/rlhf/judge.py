"""A judge that nothing is trained on: an interpolated n-gram model of held-out text, and a measure of repetition."""

import math
from collections import Counter
from collections.abc import Sequence


class NGrams:
    """P(token | the last n - 1 tokens), each order interpolated with the one below (Witten and Bell 1991).

    p_k(w | h) = (c(h, w) + T(h) p_{k-1}(w | h')) / (c(h) + T(h)), where T(h) counts the different tokens after h; below
    the unigrams every token is as likely as another.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int, order: int = 3) -> None:
        self.order = order
        self.vocabulary = vocabulary
        self.counts: Counter[tuple[int, ...]] = Counter()  # of n-grams
        self.contexts: Counter[tuple[int, ...]] = Counter()  # of what comes before their last token
        self.kinds: Counter[tuple[int, ...]] = Counter()  # how many different tokens come after it
        for ids in texts:
            for end in range(1, len(ids) + 1):
                for n in range(1, min(order, end) + 1):
                    gram = tuple(ids[end - n : end])
                    self.kinds[gram[:-1]] += self.counts[gram] == 0
                    self.counts[gram] += 1
                    self.contexts[gram[:-1]] += 1

    def probability(self, token: int, before: Sequence[int]) -> float:
        """P(token | before), of which the last order - 1 tokens count."""
        p = 1 / self.vocabulary
        for n in range(self.order):
            if n > len(before):
                break
            context = tuple(before[len(before) - n :])
            kinds = self.kinds[context]
            if kinds == 0:
                break  # never seen, nor will a longer one have been
            p = (self.counts[(*context, token)] + kinds * p) / (self.contexts[context] + kinds)
        return p

    def mean_log_likelihood(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """Of an answer's tokens after its prompt, in nats per token; 0 for an empty answer."""
        whole = [*prompt, *answer]
        logs = [math.log(self.probability(whole[i], whole[:i])) for i in range(len(prompt), len(whole))]
        return sum(logs) / max(1, len(logs))


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of an answer's n-grams that occur earlier in it."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
