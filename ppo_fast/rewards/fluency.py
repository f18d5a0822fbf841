"""Fluency: the likelihood of a completion under a frozen language model."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import ppo_fast as ppo
from ppo_fast.common.device import upload
from ppo_fast.common.errors import UserError
from ppo_fast.llm.data import Prompt, chat_text, prompt_ids

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from transformers import PreTrainedTokenizerBase

    from ppo_fast.llm.models.head import HeadInfo


class Fluency:
    """A reward: the mean log-likelihood of an answer's tokens after its prompt, in nats per token; at most 0.

    An empty answer or prompt is replaced by an end token. The tokenizer's template is applied to chats.

    Args:
        model: a causal language model, or the folder of one with its tokenizer; it is frozen.
        tokenizer: its tokenizer; None with a folder.
        same_tokens: the model has the actor's tokenizer, and evaluates the tokens that the actor sampled, its end token
            included; else the completion's text is tokenized again.
        batch_size: completions in one forward pass.
        device: where it runs. None: a model stays where it is; one loaded from a folder goes to the trainer's device,
            and is on the CPU without a trainer.

    Source: the perplexity of a text under a language model (Jelinek et al. 1977), as its negative logarithm.

    >>> judge = Fluency("runs/first/model")  # doctest: +SKIP
    >>> judge(["Once upon a time"], [" there was a king."])  # doctest: +SKIP
    [-1.93]
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        same_tokens: bool = False,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        self.follows_trainer = isinstance(model, str | Path) and device is None
        if isinstance(model, str | Path):
            from ppo_fast.llm.models.loading import load_actor

            model, tokenizer = load_actor(str(model))
        if tokenizer is None:
            raise UserError("Fluency needs the model's tokenizer")
        self.model = model.eval().requires_grad_(False)
        if device is not None:
            self.model = self.model.to(device)
        self.tokenizer = tokenizer
        self.same_tokens = same_tokens
        self.batch_size = batch_size
        self.head: HeadInfo | None = (
            None  # how its logits are computed; detected at the first call, when the device is known
        )
        self.__name__ = "fluency"

    def follow_trainer(self, device: torch.device) -> None:
        """Move a model that was loaded from a folder to the trainer's device; the trainer calls this at its start."""
        if self.follows_trainer:
            self.model = self.model.to(device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """Return one number for each answer."""
        if not completions:
            return []
        asked = prompt_ids(self.tokenizer, prompts)
        if not self.same_tokens:
            answers = list(map(self._continuation, prompts, asked, completions))
        elif completion_ids is None:
            raise UserError("same_tokens needs completion_ids")
        else:
            answers = [list(ids) for ids in completion_ids]
        end = self.tokenizer.eos_token_id
        pairs = [self._cut(before or [end], answer or [end]) for before, answer in zip(asked, answers, strict=True)]
        found: dict[int, float] = {}
        for alike in self._computed_alike([len(before) + len(answer) for before, answer in pairs]):
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                found |= zip(batch, self._mean_logprobs([pairs[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(pairs))]

    def _computed_alike(self, lengths: list[int]) -> list[list[int]]:
        """Group the indices of texts that may share a batch.

        A model may compute a batch differently if its longest text exceeds a length in its configuration (longrope).
        """
        from ppo_fast.llm.models.probe import named_lengths

        boundaries = named_lengths(self.model, max(lengths))
        alike: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            alike.setdefault(bisect_left(boundaries, length), []).append(i)
        return list(alike.values())

    def _continuation(self, prompt: Prompt, asked: list[int], completion: str) -> list[int]:
        """Tokenize an answer after its prompt; alone, if its first token would contain the end of the prompt.

        SentencePiece tokenizers would put a space before the first word of an answer alone.
        """
        chat = not isinstance(prompt, str)
        before = prompt if isinstance(prompt, str) else chat_text(self.tokenizer, prompt)
        whole = self.tokenizer(before + completion, add_special_tokens=not chat)["input_ids"]
        if whole[: len(asked)] == asked:
            return whole[len(asked) :]
        return self.tokenizer(completion, add_special_tokens=False)["input_ids"]

    def _cut(self, asked: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Truncate to the model's positions: a long prompt at its beginning, a long completion at its end."""
        from ppo_fast.llm.models.head import text_config

        positions = getattr(text_config(self.model), "max_position_embeddings", None)
        if positions is not None:
            answer = answer[: positions - 1]
            asked = asked[-(positions - len(answer)) :]
        return asked, answer

    def _mean_logprobs(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        width = max(len(asked) + len(answer) for asked, answer in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.long)
        mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (asked, answer) in enumerate(pairs):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            mask[row, len(asked) : len(asked) + len(answer)] = True
        device = next(self.model.parameters()).device
        ids, mask = upload(ids, device), upload(mask, device)[:, 1:]
        logprobs = self._logprobs(ids, mask)
        return (logprobs.sum(1) / mask.sum(1)).tolist()

    def _logprobs(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T - 1], 0 outside the mask. Causal attention: a token does not depend on the padding to its right."""
        from ppo_fast.llm.models.head import decoder_of, linear_head_of, without_cache
        from ppo_fast.llm.models.probe import detect_unpacked_head

        if self.head is None:
            self.head = detect_unpacked_head(self.model)
        if not self.head.linear:
            logits = self.model(input_ids=ids, **without_cache(self.model)).logits[:, :-1]
            found = ppo.token_logprobs(logits, ids[:, 1:], mask)
        else:
            decoder = decoder_of(self.model)
            hidden = decoder(input_ids=ids, **without_cache(decoder)).last_hidden_state[:, :-1]
            layer = linear_head_of(self.model)
            found = ppo.linear_logprobs(
                hidden,
                layer.weight,
                ids[:, 1:],
                mask,
                bias=layer.bias,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
            )
        assert isinstance(found, torch.Tensor)
        return found
