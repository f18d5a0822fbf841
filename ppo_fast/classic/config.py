"""Every option of classic RL, and its command line."""

import argparse
import dataclasses
from typing import Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from ppo_fast.common.errors import UserError
from ppo_fast.common.options import (
    STRICT,
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    Strings,
    Threads,
    add_options,
    checked_options,
    plain_value,
    setting,
)


@checked_options
@dataclass(config=STRICT)
class ClassicConfig:
    """Options of `ClassicTrainer`. Defaults follow CleanRL's ppo.py where nothing else is named.

    >>> ClassicConfig(env="CartPole-v1").gamma
    0.99
    >>> ClassicConfig(gamma=1.5)
    Traceback (most recent call last):
    ppo_fast.common.errors.UserError: gamma must be in [0, 1], got 1.5
    """

    # The environments
    env: str = setting("CartPole-v1", "Gymnasium's name of the environment, or module:Name-v0")
    env_kwargs: str = setting("{}", 'arguments of the environment as JSON, such as {"size": 9}')
    wrapper: Strings = setting(
        (),
        "wrappers around each environment, the innermost first, as MODULE:NAME or with options, such as"
        " gymnasium.wrappers:TimeLimit(max_episode_steps=100)",
    )
    num_envs: Count = setting(8, "environments that step together (N)")
    vectorization: Literal["auto", "vector_entry_point", "sync", "async"] = setting(
        "auto", "auto: the environment's own vector form if it has one and there is no wrapper, else sync"
    )
    autoreset: Literal["next_step", "same_step"] = setting(
        "next_step", "when a finished environment is reset; same_step needs Gymnasium 1.1 and sync or async"
    )
    normalize_observations: bool = setting(
        False, "normalize observations to running mean 0 and variance 1, clipped to +-10"
    )
    normalize_rewards: bool = setting(
        False, "divide rewards by the running standard deviation of the return, clipped to +-10"
    )

    # The loop
    total_steps: Count = setting(100_000, "steps of all environments together")
    rollout_steps: Count = setting(128, "steps of each environment between two updates (T)")
    seed: Seed = setting(0, "seed of everything random: weights, environments, actions, minibatches")

    # The network
    network: Literal["auto", "mlp", "cnn"] = setting("auto", "auto: cnn for images, else mlp")
    shared: bool = setting(False, "policy and value share all layers except the last (else: separate networks)")
    hidden_size: Count = setting(64, "width of hidden layers")
    hidden_layers: NonNegativeInt = setting(2, "number of hidden layers of an mlp")
    activation: Literal["tanh", "relu"] = setting("tanh", "activation of an mlp")
    log_std_init: float = setting(0.0, "continuous actions: natural logarithm of the initial standard deviation")

    # Advantages and loss
    gamma: Fraction = setting(0.99, "discount per step")
    lam: Fraction = setting(0.95, "lambda of GAE (Schulman et al. 2016)")
    normalize_advantages: bool = setting(True, "normalize the advantages of each minibatch to mean 0 and variance 1")
    epochs: Count = setting(4, "passes over each rollout")
    minibatches: Count = setting(4, "optimizer steps in each epoch")
    clip: Fraction = setting(0.2, "ratio clipped to 1 +- this")
    clip_schedule: Literal["constant", "linear"] = setting("constant", "clip range over the run")
    value_clip: Positive | None = setting(None, "clip range of the values per rollout; none: not clipped")
    value_coef: NonNegative = setting(0.5, "weight of the value loss, 0.5 (v - R)^2")
    entropy_coef: NonNegative = setting(0.0, "weight of the entropy bonus, per nat")
    target_kl: Positive | None = setting(None, "a minibatch with a larger approx_kl (nats) ends the update")
    lr: NonNegative = setting(2.5e-4, "Adam's learning rate")
    lr_schedule: Literal["constant", "linear"] = setting("linear", "learning rate over the run")
    adam_eps: NonNegative = setting(1e-5, "Adam's epsilon")
    max_grad_norm: Positive | None = setting(
        0.5, "the gradient of all weights is clipped to this norm; none: not clipped"
    )

    # Machine and output
    device: str = setting("cpu", "device of the network: cpu, cuda, ...; small networks are fastest on a cpu")
    threads: Threads = setting(
        1, "PyTorch's threads, which the command sets; small networks are fastest with 1; 0: unchanged"
    )
    backend: Literal["auto", "triton", "torch"] = setting("auto", "implementation of losses and advantages")
    eval_episodes: NonNegativeInt = setting(
        10, "episodes of the evaluation after the last update, with the most likely actions"
    )
    eval_max_steps: Count = setting(
        100_000, "an evaluation episode is cut after this number of steps: a policy may walk in circles"
    )
    record: Literal["none", "gif", "png"] = setting("none", "pictures of the first evaluation episode, at most 500")
    out: str | None = setting(None, "folder for metrics, TensorBoard events, checkpoints and pictures")
    tensorboard: bool = setting(True, "write TensorBoard events to OUT/tensorboard")
    save_every: NonNegativeInt = setting(
        0,
        "checkpoint every n updates; 0: only at the end or Ctrl-C. Environments whose state cannot be saved start new"
        " episodes then",
    )
    resume: bool = setting(False, "continue from the newest checkpoint in OUT")
    overwrite: bool = setting(False, "replace an earlier run in OUT")
    quiet: bool = setting(False, "print nothing but errors")

    _plain_values = field_validator("*", mode="before")(plain_value)

    def __post_init__(self) -> None:
        """Check combinations of options, after each option by itself; also after an assignment."""
        if self.num_envs * self.rollout_steps < self.minibatches:
            rollout = self.num_envs * self.rollout_steps
            raise UserError(f"minibatches must be at most num_envs * rollout_steps = {rollout}, got {self.minibatches}")
        if self.wrapper and self.vectorization == "vector_entry_point":
            raise UserError("wrapper needs vectorization = sync or async: an environment's own vector form takes none")
        if self.autoreset == "same_step" and self.vectorization == "vector_entry_point":
            raise UserError(
                "autoreset = same_step needs vectorization = sync or async: an environment's own vector form has its"
                " own mode"
            )
        if self.out is None and (self.resume or self.overwrite or self.record != "none"):
            raise UserError("resume, overwrite and record need out, the folder to read and write")
        if self.resume and self.overwrite:
            raise UserError("resume continues the run in out, and overwrite replaces it: give one of them")
        if self.record != "none" and not self.eval_episodes:
            raise UserError(f"record = {self.record} needs eval_episodes of at least 1: it draws the first of them")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of ClassicConfig to a command line, with their defaults."""
    add_options(parser, ClassicConfig)
    parser.set_defaults(**{option.name: option.default for option in dataclasses.fields(ClassicConfig)})
