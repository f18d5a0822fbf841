"""The loop of PPO: sample, reward, learn."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.config import PPOConfig
from ppo_fast.data import Prompts
from ppo_fast.learn import Optimizer, cut, evaluate, learn
from ppo_fast.models import Critic, check_tokenizer, frozen_copy, no_loading_bars, pick_device
from ppo_fast.progress import Progress
from ppo_fast.reward import RewardFunction, score
from ppo_fast.sample import Rollout, drop_long_prompts, respond


class PPOTrainer:
    """Proximal policy optimisation of a causal language model (Schulman et al. 2017; Ouyang et al. 2022).

    Args:
        config: every option.
        actor: any AutoModelForCausalLM; trained in place.
        tokenizer: its tokenizer, with a pad token.
        rows: dicts with a "prompt" and any other columns, which reach the reward functions.
        rewards: a function f(prompts, completions, **columns), or several by name, whose numbers are added.
        critic: a copy of the actor's backbone with a zero value head, if not given.
        reference: the frozen model of the KL penalty; a copy of the actor if not given and kl_coef > 0.

    >>> trainer = PPOTrainer(config, actor, tokenizer, rows, reward)  # doctest: +SKIP
    >>> history = trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: PPOConfig,
        actor: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
        rewards: RewardFunction | dict[str, RewardFunction],
        *,
        critic: Critic | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        check_tokenizer(tokenizer, actor)
        torch.manual_seed(config.seed)
        self.config = config
        self.tokenizer = tokenizer
        device = pick_device(config.device)
        # eval: dropout would make old and new log-probabilities differ
        self.actor = actor.to(device).eval()  # type: ignore[arg-type]
        self.critic = (Critic.from_actor(actor) if critic is None else critic).to(device).eval()
        if reference is None and config.kl_coef > 0:
            reference = frozen_copy(actor)
        self.reference = None if reference is None else reference.to(device).eval()  # type: ignore[arg-type]
        kept, self.prompts_left_out = drop_long_prompts(rows, tokenizer, actor, config)
        self.prompts = Prompts(kept, seed=config.seed)
        self.rewards = rewards if isinstance(rewards, dict) else {_name(rewards): rewards}
        self.actor_optimizer = Optimizer(self.actor, config.lr, config)
        self.critic_optimizer = Optimizer(self.critic, config.critic_lr, config)
        self.generator = torch.Generator().manual_seed(config.seed)  # the order within minibatches
        self.steps_done = 0
        self.last_rollout: Rollout | None = None

    def train(self, after_step: Callable[["PPOTrainer", dict[str, float]], bool | None] | None = None) -> list[dict]:
        """Runs all steps and returns their metrics; `after_step(trainer, metrics)` may return True to stop early."""
        history = []
        with Progress(self.config, self.prompts_left_out) as progress:
            while self.steps_done < self.config.total_steps:
                metrics = self.step()
                history.append(metrics)
                progress.show(metrics, self.last_rollout)
                if self.config.save_every and self.steps_done % self.config.save_every == 0:
                    self.save(f"step-{self.steps_done}")
                if after_step is not None and after_step(self, metrics):
                    break
        self.save("model")
        return history

    def step(self) -> dict[str, float]:
        """One round of sample, reward, advantages, learn; its metrics. Times are in seconds."""
        config = self.config
        seconds: dict[str, float] = {}
        with _timed(seconds, "sample"):
            rollout = respond(self.actor, self.tokenizer, self.prompts.take(config.prompts_per_step), config)
        with _timed(seconds, "reward"):
            scores, reward_means = score(rollout, self.rewards, config)
        with _timed(seconds, "advantages"):
            order = torch.randperm(len(rollout), generator=self.generator).tolist()
            minibatches = cut(rollout, order, config)
            experience = evaluate(self.actor, self.critic, self.reference, rollout, scores, minibatches, config)
        with _timed(seconds, "learn"):
            history = learn(
                self.actor,
                self.critic,
                rollout,
                experience,
                minibatches,
                self.actor_optimizer,
                self.critic_optimizer,
                config,
                self.generator,
            )
        self.steps_done += 1
        self.last_rollout = rollout
        return {
            "step": self.steps_done,
            "score": scores.sum().item() / len(rollout),
            **reward_means,
            "answer_tokens": sum(rollout.answer_lengths) / len(rollout),
            "ended": sum(rollout.ended) / len(rollout),
            **{name: x.item() for name, x in experience.metrics.items()},
            **{f"learn/{name}": sum(h[name] for h in history) / len(history) for name in history[0]},
            "lr": self.actor_optimizer.schedule.get_last_lr()[0],
            **{f"seconds/{name}": x for name, x in seconds.items()},
            "tokens_per_second": sum(rollout.answer_lengths) / sum(seconds.values()),
        }

    def save(self, name: str) -> Path | None:
        """Writes actor and tokenizer to OUT/name, where `from_pretrained` loads them; nothing without an OUT."""
        if self.config.out is None:
            return None
        folder = Path(self.config.out) / name
        with no_loading_bars():
            self.actor.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
