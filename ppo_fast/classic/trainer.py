"""A run of classic RL: PPO with checkpoints, evaluation, output and signals; and the command `ppo-fast classic`.

A run that is resumed gives the same bits as one that was not stopped, if both save at the same updates: environments
that save their state (ours) continue where they were; all others start new episodes at a checkpoint.
"""

import argparse
import contextlib
import dataclasses
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import gymnasium
import torch
from gymnasium.vector import VectorEnv

from ppo_fast.classic import state
from ppo_fast.classic.config import ClassicConfig, add_arguments
from ppo_fast.classic.envs.source import EnvironmentSource
from ppo_fast.classic.envs.vector import environment_states
from ppo_fast.classic.envs.workers import close
from ppo_fast.classic.envs.wrappers import Wrapper, load_wrappers
from ppo_fast.classic.evaluate import evaluate
from ppo_fast.classic.logger import RunLogger, Summary
from ppo_fast.classic.ppo import PPO
from ppo_fast.common import checkpoint
from ppo_fast.common.errors import UserError, print_error
from ppo_fast.common.lock import locked
from ppo_fast.common.options import json_object
from ppo_fast.common.signals import GRACE, Request, stop_requests

__all__ = ["ClassicTrainer", "Stopped", "add_arguments", "main"]


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run after an update; the message names the checkpoint."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.number = signal.Signals[name].value


class ClassicTrainer(PPO):
    """A run of PPO on the environments that `config` names, or on given ones.

    Args:
        config: every option.
        env_kwargs: more arguments of the environment, such as functions, which JSON cannot represent.
        wrappers: functions from an environment to a wrapped one, the innermost first, after those of `config`.
        envs: the environments, if they are not to be made from `config`.
        eval_env: makes an environment to evaluate in. None: one that is made and wrapped like those of the training.

    >>> trainer = ClassicTrainer(ClassicConfig(env="CartPole-v1", total_steps=2048, quiet=True))
    >>> trainer.train()["steps"] >= 2048
    True
    """

    def __init__(
        self,
        config: ClassicConfig,
        *,
        env_kwargs: Mapping[str, object] | None = None,
        wrappers: list[Wrapper] | None = None,
        envs: VectorEnv | None = None,
        eval_env: Callable[[], gymnasium.Env] | None = None,
    ) -> None:
        kwargs = {**json_object("env_kwargs", config.env_kwargs, '{"size": 9}'), **(env_kwargs or {})}
        self.source = EnvironmentSource(
            config.env, kwargs, [*load_wrappers(config.wrapper), *(wrappers or [])], eval_env
        )
        if envs is not None and self.source.wrappers:
            raise UserError("wrappers belong to the environments that config names: put them around those in envs")
        self.made_envs = envs is None
        self.request, self.requested_at = Request(), 0.0
        self.evaluated = 0  # episodes, for the progress line
        if envs is None:
            envs = self.source.make_training_envs(config)
            weakref.finalize(self, close, envs)  # before multiprocessing ends the processes of async ones with SIGTERM
        super().__init__(config, envs)

    def _on_step(self) -> None:
        """Stop within a rollout if a scheduler would soon kill the process."""
        if self.request.name is None:
            return
        self.requested_at = self.requested_at or time.monotonic()
        if time.monotonic() - self.requested_at > GRACE:
            raise Stopped(self.request.name, f"stopped in update {self.updates_done + 1}")

    def evaluation_env(self, *, render: bool = False) -> gymnasium.Env:
        """Make one environment like those of the training, which the caller must close."""
        return self.source.make_evaluation_env(self.envs, made_here=self.made_envs, render=render)

    def evaluate(self, episodes: int, *, record: str = "none") -> list[float]:
        """Run episodes with the most likely actions, and return their returns.

        Pictures of the first episode are written to OUT/episode.gif (`record="gif"`) or OUT/frames (`"png"`).
        """
        with contextlib.closing(self.evaluation_env(render=record != "none")) as env:
            return evaluate(
                self.act,
                env,
                self.config,
                episodes=episodes,
                record=record,
                should_stop=lambda: self.request.name is not None,
                on_episode=self._on_episode,
            )

    def _on_episode(self, episode: int) -> None:
        self.evaluated = episode

    def save(self, *, with_environments: bool = True) -> Path | None:
        """Write a checkpoint to OUT; None without an OUT."""
        if self.config.out is None:
            return None
        return state.save(Path(self.config.out), self.config, self.state_dict(with_environments=with_environments))

    def train(self) -> Summary:
        """Run to the end, evaluate, and return a summary, which is also written to OUT/summary.json.

        Raises:
            Stopped: a KeyboardInterrupt. After Ctrl-C, SIGTERM or SIGHUP the current update is completed, and with an
                OUT there is a checkpoint, from which `resume` continues.
        """
        with locked(self.config.out):
            return self._train()

    def _train(self) -> Summary:
        c = self.config
        if c.resume:
            self._resume()
        if c.eval_episodes:  # what cannot be evaluated, or drawn, must fail before the training
            self.evaluate(0, record=c.record)
        start, first_step = time.perf_counter(), self.global_step
        with (
            RunLogger(c, first_step, lambda: self.global_step + self.rollout_step * self.envs.num_envs) as log,
            stop_requests(lambda text: log.info(text) if c.out else None) as self.request,
        ):
            log.info(self._description())
            saved = self._run_updates(log)
            seconds = time.perf_counter() - start
            log.phase = lambda: f"evaluation: {self.evaluated} of {c.eval_episodes} episodes"
            returns = self.evaluate(c.eval_episodes, record=c.record) if c.eval_episodes else []
            if self.request.name is not None:
                raise Stopped(self.request.name, f"stopped in the evaluation; the training is complete, {saved}")
            recent = self.recent_returns
            summary: Summary = {
                "env": c.env,
                "steps": self.global_step,
                "episodes": self.episodes,
                "seconds": seconds,
                "steps_per_second": (self.global_step - first_step) / max(seconds, 1e-9),
                "return": sum(recent) / len(recent) if recent else None,
                "eval_returns": returns,
                "eval_return": sum(returns) / len(returns) if returns else None,
            }
            log.log_summary(summary)
        return summary

    def _resume(self) -> None:
        folder = Path(str(self.config.out)) / "checkpoints"
        newest = checkpoint.newest(folder)
        if newest is None:
            raise UserError(f"nothing to resume: there is no checkpoint in {folder}; start a run in another folder")
        self.load_state_dict(state.load(newest, self.config))

    def _run_updates(self, log: RunLogger) -> Path | None:
        """Run all updates, with checkpoints, and return the last checkpoint.

        A signal ends the run after an update, and an error of the environments at once; what was learned until then is
        saved.
        """
        c, failure = self.config, None
        saved = checkpoint.newest(Path(c.out) / "checkpoints") if c.out and c.resume else None
        saved_at = self.updates_done if c.resume else None
        while self.global_step < c.total_steps and self.request.name is None:
            try:
                log.log_metrics(self.step())
            except (Exception, KeyboardInterrupt) as error:  # of any kind: code of the user
                if not self.collecting or c.out is None:
                    raise
                failure = error
                time.sleep(0.1)  # a signal that has ended a process of the environments may reach this one later
                break
            if c.save_every and self.updates_done % c.save_every == 0 and (folder := self.save()):
                saved, saved_at = folder, self.updates_done
                self.reset_or_restore_envs(environment_states(self.envs))
        # A run that is stopped between two checkpoints, and whose environments would start new episodes here, unlike
        # those of a run that was not stopped, continues from the last checkpoint
        stopped = failure is not None or self.request.name is not None
        new_episodes = failure is not None or environment_states(self.envs) is None
        if saved_at != self.updates_done and not (stopped and new_episodes and c.save_every and saved):
            saved, saved_at = self.save(with_environments=failure is None), self.updates_done
        if self.request.name is not None:
            where = "nothing was saved, because out is not set"
            if saved is not None:
                where = f"{saved} is the checkpoint of update {saved_at}, from which --resume continues"
            raise Stopped(self.request.name, f"stopped after update {self.updates_done}; {where}") from failure
        if failure is not None:
            log.info(f"the environments failed in update {self.updates_done + 1}; {saved} has what was learned before")
            raise failure
        return saved

    def _description(self) -> str:
        """Describe spaces and network in one line."""
        c, space = self.config, self.envs.single_action_space
        network = "CNN" if self.policy.cnn else f"MLP of {c.hidden_layers} layers of {c.hidden_size}"
        kind = f"one {network} with two heads" if c.shared else f"policy and value: one {network} each"
        inputs = f"{'x'.join(map(str, self.observation_shape))} numbers"
        return f"observations: {inputs}; actions: {space}; {kind}, {self.adam.weights.numel()} weights on {self.device}"


def main(arguments: argparse.Namespace) -> int:
    """Train with the options of `add_arguments`.

    Returns:
        The exit status, 128 + signal after a signal.

    Raises:
        UserError: bad input.
    """
    config = ClassicConfig(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ClassicConfig)}
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.quiet:
        threads = torch.get_num_threads()
        print(
            f"PPO on {config.env}: {config.total_steps} steps of {config.num_envs} environments;"
            f" PyTorch uses {threads} thread{'s' * (threads > 1)}",
            flush=True,
        )
    trainer = ClassicTrainer(config)
    try:
        trainer.train()
    except Stopped as stopped:
        print_error(f"ppo-fast: {stopped}")
        return 128 + stopped.number
    finally:
        close(trainer.envs)
    return 0
