"""Decoding: the text of a completion as the continuation of its prompt, and the token that completes a stop text.

Decoders of the SentencePiece kind (Llama 2, Mistral, Gemma) drop the space before the first word of what they decode.
A completion that is decoded alone loses a space that the model generated. Here it is decoded after a token of the
prompt, whose text is then removed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppo_fast.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what decoders write for a part of a character


CONTROL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Special tokens that are not part of a text: those with a role, and the marks of the chat template.

    Other special tokens, such as <think>, are what a model writes, and stay in the text. So does an ordinary token that
    only pads, such as "!", or stands for unknown ones.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in CONTROL}
    named = {i for i in roles if i is not None and (i in added or i == tokenizer.eos_token_id)}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    marks = {i for i in tokenizer.all_special_ids if str(tokenizer.convert_ids_to_tokens(i)) in template}
    return marks | named


class CompletionText:
    """Decodes the completions of some prompts.

    Args:
        tokenizer: the actor's.
        prompts: B lists of token ids.

    >>> CompletionText(tokenizer, prompts).decode(completions)  # doctest: +SKIP
    [' Paris']
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]]) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        # False: nothing but special tokens before the completion, which then begins the text
        self.continues = [any(token not in special for token in reversed(ids)) for ids in prompts]
        self._texts: dict[int, str] = {}
        self._anchor: list[int] = []
        self._anchor_text = ""
        tried = special
        for token in (token for ids in prompts for token in reversed(ids)):
            if token in tried:
                continue
            text = self._plain([token])
            if text.strip() and BROKEN not in text:  # any token will do whose text is whole characters
                self._anchor, self._anchor_text = [token], text
                break
            tried.add(token)

    def decode(self, completions: Sequence[Sequence[int]], *, clean: bool = True) -> list[str]:
        """The text of each completion, in the order of the prompts; `clean`: without `control_tokens`."""
        if clean:
            control = control_tokens(self.tokenizer)
            completions = [[token for token in ids if token not in control] for ids in completions]
        before = [self._anchor if continues else [] for continues in self.continues]
        texts = self.tokenizer.batch_decode(
            [[*first, *ids] for first, ids in zip(before, completions, strict=True)], clean_up_tokenization_spaces=False
        )
        return [
            self._rest(text, ids) if first else text
            for text, first, ids in zip(texts, before, completions, strict=True)
        ]

    def token(self, token: int) -> str:
        """The text of one token within a text; special tokens have theirs."""
        if token not in self._texts:
            self._texts[token] = self._after_anchor([token])
        return self._texts[token]

    def tail(self, row: int, ids: Sequence[int], length: int, characters: int) -> str:
        """At least the last `characters` of the text of the first `length` tokens, special tokens included."""
        start, found = length, 0
        while start > 0 and (found < characters or BROKEN in self.token(ids[start])):
            start -= 1
            found += len(self.token(ids[start]))
        if self.continues[row]:
            return self._after_anchor(ids[start:length])
        return self._plain(ids[:length])  # the first token may lose its space here

    def _after_anchor(self, ids: Sequence[int]) -> str:
        return self._rest(self._plain([*self._anchor, *ids]), ids)

    def _rest(self, text: str, ids: Sequence[int]) -> str:
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._plain(ids)

    def _plain(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list of ids
        return text


class StopTexts:
    """Finds the token of a completion with which a stop text is complete.

    The completion's tokens alone count: what the prompt ends with is not part of a stop text.

    Raises:
        UserError: a stop text is empty.
    """

    def __init__(self, texts: CompletionText, stop: Sequence[str]) -> None:
        if "" in stop:
            raise UserError("a stop text is empty: every answer would end before its first token; remove it")
        self.texts = texts
        self.stop = tuple(stop)
        self.longest = max(map(len, self.stop), default=0)
        self._may_complete: dict[int, bool] = {}

    def completed(self, row: int, ids: Sequence[int], length: int) -> bool:
        """Whether the last of a completion's first `length` tokens completes a stop text."""
        last = ids[length - 1]
        if not self._may_end_with(last):
            return False
        text = self.texts.tail(row, ids, length, self.longest + len(self.texts.token(last)))
        return any(x in text for x in self.stop)

    def _may_end_with(self, token: int) -> bool:
        """Whether a token has the last character of a stop text, or a part of a character: most tokens have neither."""
        if token not in self._may_complete:
            text = self.texts.token(token)
            self._may_complete[token] = BROKEN in text or any(x[-1] in text for x in self.stop)
        return self._may_complete[token]
