"""Shared by the phases: settings, the supervised model, the held-out prompts, and the rewards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ppo_fast.common.device import pick_device
from ppo_fast.examples.rlhf.judge import NGrams, repetition
from ppo_fast.examples.rlhf.text import Stretch, stretches
from ppo_fast.llm.models.reward_model import RewardModel, load_reward_model
from ppo_fast.llm.models.weights import no_loading_bars
from ppo_fast.rewards import Fluency

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Settings:
    """Options of the command line, and sizes, which tests reduce."""

    text: str | None = None
    pairs: str | None = None
    seed: int = 0
    out: str = "runs/rlhf"
    ppo_steps: int = 70
    kl_target: float = 16.0
    entropy: float = 0.945  # share of the supervised model's that PPO keeps
    fluency: float = 0.0
    coherence: float = 0.5
    sweep: tuple[float, ...] = ()
    device: str = "auto"
    quiet: bool = False
    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    supervised_steps: int = 130
    pair_count: int = 6000
    held_out_pairs: int = 500
    prompts: int = 2000
    eval_prompts: int = 256
    batch: int = 96  # answers of a PPO step


def load_supervised(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of phase 1."""
    folder = out / "supervised"
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))  # as text.make_tokenizer makes it
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer


def held_out_stretches(
    tokenizer: PreTrainedTokenizerFast, parts: dict[str, list[str]], settings: Settings
) -> list[Stretch]:
    """The prompts of every evaluation, and what really follows them."""
    return stretches(tokenizer, parts["held_out"], settings.eval_prompts, settings.seed + 6)


def coherence(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """A reward: share of the prompt's longer words that recur, minus the share of repeated 3-grams."""
    found = []
    for prompt, text, ids in zip(prompts, completions, completion_ids, strict=True):
        asked = {word.lower() for word in prompt.split() if len(word) > 3}
        used = {word.lower() for word in text.split()}
        found.append(len(asked & used) / max(1, len(asked)) - repetition(ids))
    return found


def n_gram_judge(tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> Reward:
    """A reward: mean log-likelihood under an n-gram model of unseen text, in nats per token."""
    grams = NGrams(tokenizer(passages)["input_ids"], len(tokenizer))

    def judge(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        asked = tokenizer(prompts)["input_ids"]
        return [grams.mean_log_likelihood(p, a) for p, a in zip(asked, completion_ids, strict=True)]

    return judge


def rewards_of(
    out: Path, parts: dict[str, list[str]], settings: Settings
) -> tuple[dict[str, Reward], dict[str, float]]:
    """All rewards by name, and their weights. The judge's weight is 0: it is only recorded."""
    device = pick_device(settings.device)
    with no_loading_bars():
        classifier, its_tokenizer = load_reward_model(out / "reward_model")
        reference, tokenizer = load_supervised(out)
    reference = nn.Module.to(reference, device)
    rewards: dict[str, Reward] = {
        "reward_model": RewardModel(classifier, its_tokenizer, device=device),
        "coherence": coherence,
        "fluency": Fluency(reference, tokenizer, same_tokens=True, batch_size=128),
        "judge": n_gram_judge(tokenizer, parts["judge"]),
    }
    weights = {"reward_model": 1.0, "coherence": settings.coherence, "fluency": settings.fluency, "judge": 0.0}
    return rewards, weights
