"""The interface of samplers: what they are asked for, and what they return."""

from dataclasses import dataclass
from typing import Protocol

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig


@dataclass(frozen=True)
class SamplingParams:
    """From which distribution, and how far, a sampler completes prompts; made from the options in `from_config` only.

    Args:
        max_new_tokens: the longest completion, in tokens.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that hold this probability.
        min_p: only tokens with at least this share of the likeliest one's probability.
        stop: texts that end a completion, besides the end token; they belong to it.
        seed: of an engine with random numbers of its own: another one in each process and each step, repeated with the
            seed of the run. It is one for the whole call: where prompts repeat, derive one for each row.
            `GenerateSampler` uses torch's generator instead, which is part of checkpoints.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @classmethod
    def from_config(cls, config: PPOConfig, *, seed: int | None = None) -> "SamplingParams":
        """The parameters that the options of a run ask for."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=config.stop,
            seed=seed,
        )


@dataclass
class Completions:
    """What a sampler returns, one entry for each prompt."""

    ids: list[list[int]]  # the tokens, with the end token where there is one; at least one each
    ended: list[bool]  # False: cut by max_new_tokens
    logprobs: list[list[float]] | None = None  # of each token at the sampling temperature, before top-k and top-p


class Sampler(Protocol):
    """Anything that completes prompts: the actor's own `generate` (`GenerateSampler`), vLLM, a server.

    An engine with weights of its own must copy the actor's before it samples: `sample` is called once in each step and
    each evaluation, and the actor has been trained since the last call. The difference between its log-probabilities
    and the trainer's is logged as sampler_gap.
    """

    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
        """Completions of prompts, given as token ids, in their order."""
        ...


def check_sampler(sampler: object) -> None:
    """Raise UserError if an object has no method `sample`."""
    if not callable(getattr(sampler, "sample", None)):
        raise UserError(
            "the sampler must have a method sample(prompts: list[list[int]], params: SamplingParams) -> Completions,"
            f" which {sampler!r:.60} lacks"
        )
