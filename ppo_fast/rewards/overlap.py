"""Summaries and translations: overlap with a reference, by the packages that papers report with (extra `rewards`)."""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

from ppo_fast.common.errors import UserError
from ppo_fast.rewards.matching import best_of, references_of, rows_of, words

Score = Callable[[str, list[str]], float]  # of an answer against its references, 0 to 100


def package(name: str, install: str) -> ModuleType:
    """Import an optional package; the error names the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this needs {install}: pip install {install}, or the extra ppo_fast[rewards]") from error


def rouge_l(
    prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object], *, stemmer: bool = True
) -> list[float]:
    """Return the F1 of the longest common subsequence of words (Lin 2004, section 3), by rouge-score.

    Args:
        prompts: [B], not used.
        completions: [B] answers; an empty one gets 0.
        reference: [B] texts, or lists of texts of which the best counts.
        stemmer: Porter's stems are compared, as most papers on summaries do.

    Words are letters and digits of any script: rouge-score's own tokenizer drops all that are not ASCII. For languages
    without blanks between words the result is an exact match.

    Raises:
        ValueError: an answer has no reference. UserError: rouge-score is not installed.

    >>> rouge_l(["Summarise: ..."], ["The cats sat down"], ["A cat sat on the mat"])  # cat sat: 2 of 4 and of 6 words
    [0.4]
    """
    f1 = _rouge(stemmer)
    return best_of(completions, reference, lambda answer, right: f1(str(right), answer))


@functools.cache
def _rouge(stemmer: bool) -> Callable[[str, str], float]:
    """Return the function from a reference and an answer to ROUGE-L's F1."""
    rouge_scorer = package("rouge_score.rouge_scorer", "rouge-score")
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words(stemmer))
    return lambda right, answer: scorer.score(right, answer)["rougeL"].fmeasure


class _Words:
    """A tokenizer for rouge-score that splits words of all scripts."""

    def __init__(self, stemmer: bool) -> None:
        self.stem = package("nltk.stem.porter", "rouge-score").PorterStemmer().stem if stemmer else None

    def tokenize(self, text: str) -> list[str]:
        found = words(text)
        return found if self.stem is None else [self.stem(word) if len(word) > 3 else word for word in found]


def bleu(
    prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object], *, tokenize: str = "13a"
) -> list[float]:
    """Return the BLEU of each completion alone, from 0 to 1 (Papineni et al. 2002), by sacrebleu.

    A sentence has few 4-grams: orders that it is too short for are left out, and counts of 0 are smoothed (sacrebleu's
    effective_order and "exp").

    Args:
        prompts: [B], not used.
        completions: [B] answers; an empty one gets 0.
        reference: [B] texts, or lists of texts, which count together.
        tokenize: sacrebleu's name of a tokenizer: 13a or intl for languages with blanks, char or zh for Chinese,
            ja-mecab, ko-mecab, none. Those that it would download are rejected.

    Raises:
        ValueError: an answer has no reference, or there is no such tokenizer. UserError: sacrebleu is not installed.

    >>> bleu(["Translate: ..."], ["the cat sat on the mat"], ["the cat sat on the mat"])
    [1.0]
    """
    return _against_all(_bleu(tokenize), completions, reference)


def chrf(
    prompts: Sequence[object], completions: Sequence[str], reference: Sequence[object], *, word_order: int = 0
) -> list[float]:
    """Return the chrF of each completion alone, from 0 to 1 (Popovic 2015), by sacrebleu; for every script.

    Arguments and errors as for `bleu`; `word_order=2` is chrF++.

    >>> chrf(["Translate: ..."], ["Guten Tag"], ["Guten Tag"])
    [1.0]
    """
    return _against_all(_chrf(word_order), completions, reference)


_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")


@functools.cache
def _bleu(tokenize: str) -> Score:
    if tokenize not in _TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(_TOKENIZERS)}; got {tokenize!r}")
    metric = package("sacrebleu", "sacrebleu").BLEU(tokenize=tokenize, effective_order=True)
    return lambda answer, rights: metric.sentence_score(answer, rights).score


@functools.cache
def _chrf(word_order: int) -> Score:
    metric = package("sacrebleu", "sacrebleu").CHRF(word_order=word_order)
    return lambda answer, rights: metric.sentence_score(answer, rights).score


def _against_all(score: Score, completions: Sequence[str], reference: Sequence[object]) -> list[float]:
    return [
        min(1.0, score(completion, list(map(str, references_of(rights, row)))) / 100)
        for row, completion, rights in rows_of(completions, reference)
    ]
