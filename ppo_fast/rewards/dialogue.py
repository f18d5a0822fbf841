"""Dialogue and free text: length, echoes of the user's turn, repetition, and answers that leave their role."""

import re
from collections.abc import Sequence

from ppo_fast.llm.data import Prompt
from ppo_fast.rewards.matching import words

UNITS = ("words", "characters", "tokens")


def length_band(
    prompts: Sequence[object],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    low: int = 1,
    high: int = 100,
    unit: str = "words",
) -> list[float]:
    """Return 1 for `low` to `high` units; below, the share of `low`; above, less by the excess over `high`.

    An answer of 0 units (if low > 0), or of twice `high` or more, gets 0: in between, the slope leads to the band.

    Args:
        prompts: [B], not used.
        completions: [B] answers.
        completion_ids: [B] lists of their tokens, which the trainer passes; for unit="tokens" only.
        low, high: the band, both ends in it.
        unit: words (between blanks), characters, or tokens.

    >>> length_band(["Hi"] * 3, ["one two", "", "a b c d e f"], low=2, high=4)
    [1.0, 0.0, 0.5]
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    if not 0 <= low <= high or high == 0:
        raise ValueError(f"0 <= low <= high, high > 0 expected, got {low} and {high}")
    if unit == "tokens":
        if completion_ids is None:
            raise ValueError("unit='tokens' needs completion_ids")
        lengths = [len(ids) for ids in completion_ids]
    else:
        lengths = [len(text.split()) if unit == "words" else len(text) for text in completions]
    return [n / low if n < low else max(0.0, 1.0 - max(0, n - high) / high) for n in lengths]


def no_echo(prompts: Sequence[Prompt], completions: Sequence[str], *, n: int = 4) -> list[float]:
    """Return 1 minus the share of word n-grams that occur in the prompt too, or in the user's last turn of a chat.

    An answer of fewer than n words is searched for as a whole; an empty one repeats nothing and gets 1.

    >>> no_echo(["Tell me about the sea, please."] * 2, ["about the sea, please.", "It is wide and deep."])
    [0.0, 1.0]
    """
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, said = words(_last_turn(prompt)), words(completion)
        size = min(n, len(said))
        known, grams = set(ngrams(asked, size)), ngrams(said, size)
        found.append(1.0 - sum(gram in known for gram in grams) / len(grams) if grams else 1.0)
    return found


def no_repetition(prompts: Sequence[object], completions: Sequence[str], *, n: int = 3) -> list[float]:
    """Return 1 minus the share of word n-grams that occur earlier in the answer (Welleck et al. 2020, seq-rep-n).

    >>> no_repetition(["Continue:"] * 2, ["so it goes so it goes so it goes", "all is well"])
    [0.42857142857142855, 1.0]
    """
    grams = [ngrams(words(completion), n) for completion in completions]
    return [len(set(some)) / len(some) if some else 1.0 for some in grams]


def stays_in_role(
    prompts: Sequence[object],
    completions: Sequence[str],
    raw_completions: Sequence[str] | None = None,
    ended: Sequence[bool] | None = None,
    *,
    others: Sequence[str] = ("user", "human", "system", "assistant", "customer", "question", "q"),
) -> list[float]:
    """Return 0 for a completion in which another speaker begins, else 1.

    That is a line that begins with one of `others` and a colon, perhaps bold or as a heading ("### Human:"),
    or a mark of a chat template such as <|im_start|>, [INST] or <start_of_turn>. In many tokenizers these are special
    tokens, which only the raw text has; the mark that ends an answer is allowed.

    Args:
        prompts: [B], not used.
        completions: [B] answers.
        raw_completions: [B] answers with their special tokens, which the trainer passes.
        ended: [B] bools, True for an answer with an end token, which the trainer passes.
        others: names of other speakers, in any case.

    >>> stays_in_role(["Hi"] * 2, ["Hello! How are you?", "Hello!\\nUser: fine\\nAssistant: good"])
    [1.0, 0.0]
    """
    if isinstance(others, str):
        raise ValueError(f"others must be a list of names, got the text {others!r}")
    names = "|".join(map(re.escape, others))
    speaker = re.compile(rf"^[ \t#*_>]*(?:{names})[\s*_]*[:\uff1a]", re.IGNORECASE | re.MULTILINE)
    raws = completions if raw_completions is None else raw_completions
    finished = [False] * len(raws) if ended is None else ended
    return [
        0.0 if speaker.search(text) or _TEMPLATE.search(text) or _marked(raw, done) else 1.0
        for text, raw, done in zip(completions, raws, finished, strict=True)
    ]


def _marked(raw: str, ended: bool) -> bool:
    """Check whether a raw text has a mark of a template besides the one that ends the answer."""
    return any(not (ended and mark.end() == len(raw)) for mark in _TEMPLATE.finditer(raw))


_TEMPLATE = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<<SYS>>|</?(?:start|end)_of_turn>|###\s*(?:Instruction|Input)", re.I)


def ngrams(items: Sequence[object], n: int) -> list[tuple[object, ...]]:
    """List all runs of n items; none for n = 0."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)] if n > 0 else []


def _last_turn(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    turns = [message["content"] for message in prompt if message["role"] == "user"]
    turn = turns[-1] if turns else ""
    if not isinstance(turn, str):
        raise ValueError(f"the content of a user's message must be a text, got {turn!r:.80}")
    return turn
