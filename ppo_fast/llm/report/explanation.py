"""Explanation of one completion of a training step, token by token."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ppo_fast.common.text import escape_control
from ppo_fast.llm.data import as_text
from ppo_fast.llm.decoding import BROKEN, CompletionText
from ppo_fast.llm.experience import Experience
from ppo_fast.llm.models.policy import Policy, packed_mode
from ppo_fast.llm.packing.pack import make_pack


@dataclass(frozen=True)
class TokenExplanation:
    """One completion of a training step, token by token: the reasons and the size of the update of the policy."""

    prompt: str
    answer: str
    score: float
    tokens: list[str]  # T
    numbers: dict[str, list[float]]  # reward, kl (with a reference), value, advantage, ratio; T each


@torch.no_grad()
def explain(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, experience: Experience, *, with_kl: bool
) -> TokenExplanation:
    """Explain the completion with the largest sum of |advantage|, and the effect of the step on it.

    The ratio is p(token) after the step over p(token) when it was sampled.
    """
    rollout = experience.rollout
    row = int(experience.advantages.abs().sum(1).argmax())
    length = rollout.completion_lengths[row]
    prompt = rollout.tokens[row, : -rollout.completion_width].tolist()[-rollout.prompt_lengths[row] :]
    texts = CompletionText(tokenizer, [prompt])
    with packed_mode(policy):
        after = policy.evaluate(make_pack(rollout, [row]))
    numbers = {"reward": experience.rewards[row, :length]}
    if with_kl:
        numbers["kl"] = experience.kl[row, :length]
    numbers["value"] = experience.values[row, :length]
    numbers["advantage"] = experience.advantages[row, :length]
    counted, ratio = experience.mask[row, :length], torch.ones_like(numbers["value"])
    ratio[counted] = (after.logprobs - experience.logprobs[row, :length][counted]).exp()
    numbers["ratio"] = ratio
    return TokenExplanation(
        prompt=as_text(rollout.columns["prompt"][row]),
        answer=rollout.completions[row],
        score=rollout.scores[row],
        tokens=[visible(texts, i) for i in rollout.completion_ids[row]],
        numbers={name: x.tolist() for name, x in numbers.items()},
    )


def visible(texts: CompletionText, token: int) -> str:
    """Return the text of a token with visible spaces; for a part of a character, its name in the tokenizer."""
    text = texts.token(token)
    if BROKEN in text or not text:
        # an embedding may have more rows than the tokenizer has tokens
        text = str(texts.tokenizer.convert_ids_to_tokens(token) or f"<{token}>")
    return escape_control(text.replace(" ", "␣"))
