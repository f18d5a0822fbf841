"""ppo-fast critic: fit the critic of a start model to recorded or sampled answers, before PPO."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.cli.train import (
    RunOptions,
    Sources,
    load_given_critic,
    load_reward_models,
    load_rewards,
    weights_of_rewards,
)
from ppo_fast.common.errors import UserError
from ppo_fast.common.lock import absolute
from ppo_fast.llm.config import PPOConfig

if TYPE_CHECKING:  # they import PyTorch and transformers
    from rich.console import Console

    from ppo_fast.llm.critic_fit import Answers, FitRow

SAMPLE = "sample"


def fit(arguments: argparse.Namespace, config: PPOConfig, run: RunOptions) -> int:
    """Run `ppo-fast critic`: read the inputs, fit, and write the critic. Returns the exit status."""
    from ppo_fast.common.console import console_of, counted, say
    from ppo_fast.common.launched import process_count

    if process_count() > 1:
        raise UserError("a critic is fitted in one process: start ppo-fast critic without torchrun")
    if config.out is None:
        raise UserError("--out is missing: the folder for the critic")
    sampled = arguments.rollouts == SAMPLE
    if sampled and not run.prompts:
        raise UserError("--rollouts sample needs --prompts, to which the model samples answers")
    console = console_of(quiet=config.quiet)
    say(console, "importing PyTorch and transformers takes some seconds")
    out = _claim(absolute(config.out), overwrite=arguments.overwrite)
    config = dataclasses.replace(config, out=str(out))  # a reward's module may change the working directory
    rewards = load_rewards(run.reward) if sampled else {}
    reward_weights = weights_of_rewards(rewards, run) if sampled else {}
    from ppo_fast.llm.critic_fit import CriticFit, check_count, check_held_out
    from ppo_fast.llm.data import read_named_prompts, set_template_options
    from ppo_fast.llm.distributed import init_distributed
    from ppo_fast.llm.models.loading import load_actor
    from ppo_fast.llm.rollout_files import read_rollouts

    check_held_out(arguments.held_out)  # before the answers are sampled
    rows = None
    if sampled:
        check_count(arguments.answers)
        rows, _ = read_named_prompts(run.prompts, prompt_field=run.prompt_field, chat=run.chat)
    recorded = [] if sampled else read_rollouts(arguments.rollouts)
    sources = Sources(init_distributed(config), code=run.trust_remote_code)
    say(console, f"loading {run.model}")
    load = functools.partial(load_actor, pad_token=run.pad_token, trust_remote_code=run.trust_remote_code)
    actor, tokenizer = load(sources.find(run.model, "model"))
    if run.chat_template_kwargs is not None:
        set_template_options(tokenizer, run.chat_template_kwargs)
    judges = load_reward_models(run.reward_model, sources) if sampled else {}
    critic = None if run.critic_model is None else load_given_critic(run.critic_model, sources, actor, tokenizer)
    fitting = CriticFit(config, actor, tokenizer, critic=critic, rows=rows, recorded=recorded)
    for note in fitting.notes:
        say(console, note)
    for judge in judges.values():
        judge.follow_dtype(fitting.config)
    with counted(console, "answers", max(1, arguments.answers)) as advance:
        answers = fitting.answers(
            rewards | judges or None,
            count=arguments.answers,
            reward_weights=reward_weights,
            after=lambda done: advance(min(done, arguments.answers)),
        )
    say(console, _described(answers))
    found = fitting.fit(answers, held_out=arguments.held_out, after=functools.partial(_show, console))
    fitting.save(out, found)
    before, after = found[0].explained_variance, found[-1].explained_variance
    say(console, f"the critic explains {after:.3f} of the variance of held-out returns, {before:.3f} before")
    say(console, f"it is in {out}: ppo-fast train --critic-model {out} --critic {config.critic} starts from it")
    return 0


def _claim(out: Path, *, overwrite: bool) -> Path:
    """Reject a folder with files of others or an earlier critic, and make one that is missing."""
    from ppo_fast.common.folders import claim
    from ppo_fast.llm.critic_fit import COMMAND
    from ppo_fast.llm.models.critic_folder import VALUE_HEAD

    claim(out, COMMAND)
    if (out / VALUE_HEAD).exists() and not overwrite:
        raise UserError(f"{out} already holds a critic: choose another --out, or replace it with --overwrite")
    return out


def _described(answers: "Answers") -> str:
    returns = answers.returns[answers.mask]
    return (
        f"{len(answers.rollout)} answers to {len(set(answers.prompts()))} prompts; the returns of their"
        f" {len(returns)} tokens have mean {returns.mean():.4g} and standard deviation {returns.std(correction=0):.4g}"
    )


def _show(console: "Console", row: "FitRow") -> None:
    from ppo_fast.common.console import say

    loss = "" if row.value_loss is None else f", value loss {row.value_loss:.4g}"
    say(console, f"{row.phase}: explained variance on held-out answers {row.explained_variance:.4f}{loss}")
