"""The text: reading it, splitting it into disjoint parts, and corrupting it for the rejected answers."""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppo_fast.common.errors import UserError
from ppo_fast.llm.data import read_text as read_file

PROMPT_TOKENS = 24
ANSWER_TOKENS = 64
PASSAGE = 1500  # characters, about
SHARES = {"supervised": 0.42, "preferences": 0.28, "held_out": 0.15, "judge": 0.15}


@dataclass(frozen=True)
class Stretch:
    """A piece of real text: a prompt, and what follows it."""

    prompt: str
    follows: str


def read_text(path: str | None) -> str:
    """A file's text, or the language reference that every CPython includes.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is too short to learn from.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    text = read_file(path, "text")
    if len(text) < 50_000:
        raise UserError(f"{path} has {len(text)} characters: too few to learn from, 50000 are the least")
    return text


def cut(text: str, seed: int) -> dict[str, list[str]]:
    """Passages of about PASSAGE characters, each paragraph once, dealt out to the parts of SHARES."""
    passages, current = [], ""
    for paragraph in dict.fromkeys(text.split("\n\n")):  # a paragraph that comes twice must not be in two parts
        if not paragraph.strip():
            continue
        current += paragraph + "\n\n"
        if len(current) >= PASSAGE:
            passages.append(current)
            current = ""
    passages.append(current or "\n")
    random.Random(seed).shuffle(passages)
    parts, start = {}, 0
    for name, share in SHARES.items():
        stop = len(passages) if name == "judge" else start + round(share * len(passages))
        parts[name] = passages[start:stop]
        start = stop
    return parts


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016), learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def stretches(tokenizer: PreTrainedTokenizerFast, passages: list[str], count: int, seed: int) -> list[Stretch]:
    """Places in the passages, at random, each with PROMPT_TOKENS before and ANSWER_TOKENS after."""
    chooser = random.Random(seed)
    ids = [x for x in tokenizer(passages)["input_ids"] if len(x) > PROMPT_TOKENS + ANSWER_TOKENS]
    if not ids:
        raise UserError("no passage of the text is long enough for a prompt and an answer")
    found = []
    for _ in range(count):
        passage = chooser.choice(ids)
        start = chooser.randrange(len(passage) - PROMPT_TOKENS - ANSWER_TOKENS)
        middle = start + PROMPT_TOKENS
        prompt, follows = passage[start:middle], passage[middle : middle + ANSWER_TOKENS]
        found.append(Stretch(*tokenizer.batch_decode([prompt, follows])))
    return found


def spoil(stretch: Stretch, others: list[Stretch], kind: str, chooser: random.Random) -> str:
    """Corrupt a continuation: its words are shuffled, some replaced, a few repeated, or misspelt."""
    words = stretch.follows.split(" ")
    if kind == "disorder":
        return " ".join(chooser.sample(words, len(words)))
    if kind == "replaced":
        other = chooser.choice(others).follows.split(" ")
        return " ".join(chooser.choice(other) if chooser.random() < 0.5 else word for word in words)
    if kind == "repetition":
        few = words[: chooser.randint(1, 4)]
        return " ".join((few * len(words))[: len(words)])
    if kind == "misspelt":
        return "".join(
            chooser.choice("etaoinshrdlu") if c.isalpha() and chooser.random() < 0.3 else c for c in stretch.follows
        )
    raise ValueError(f"kind must be disorder, replaced, repetition or misspelt, got {kind!r}")


KINDS = ("disorder", "replaced", "repetition", "misspelt")
