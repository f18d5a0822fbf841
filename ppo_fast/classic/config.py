"""Every option of classic.py, and its command line."""

import argparse
import dataclasses
from dataclasses import dataclass

from ppo_fast.common.errors import UserError
from ppo_fast.common.options import add_option, check_setting, setting


@dataclass
class ClassicConfig:
    """Options of `ClassicTrainer`. Defaults follow CleanRL's ppo.py where nothing else is named.

    >>> ClassicConfig(env="CartPole-v1").gamma
    0.99
    >>> ClassicConfig(gamma=1.5)
    Traceback (most recent call last):
    ppo_fast.common.errors.UserError: gamma must lie in [0, 1], got 1.5
    """

    # The environments
    env: str = setting("CartPole-v1", "Gymnasium's name of the environment, or module:Name-v0")
    env_kwargs: str = setting("{}", 'arguments of the environment as JSON, such as {"size": 9}')
    wrapper: tuple[str, ...] = setting(
        (),
        "wrappers around each environment, the innermost first, as MODULE:NAME or with options, such as"
        " gymnasium.wrappers:TimeLimit(max_episode_steps=100)",
    )
    num_envs: int = setting(8, "environments that run side by side (N)", 1)
    vectorization: str = setting(
        "auto",
        "auto: the environment's own vector form if it has one and there is no wrapper, else sync",
        choices=("auto", "vector_entry_point", "sync", "async"),
    )
    autoreset: str = setting(
        "next_step",
        "when a finished environment starts anew; same_step needs Gymnasium 1.1 and sync or async",
        choices=("next_step", "same_step"),
    )
    normalize_observations: bool = setting(False, "observations to running mean 0 and variance 1, clipped to +-10")
    normalize_rewards: bool = setting(False, "rewards divided by the running spread of the return, clipped to +-10")

    # The loop
    total_steps: int = setting(100_000, "steps of single environments in all", 1)
    rollout_steps: int = setting(128, "steps of each environment between two updates (T)", 1)
    seed: int = setting(0, "seed of everything random: weights, environments, actions, minibatches", 0, 2**32 - 1)

    # The network
    network: str = setting("auto", "auto: cnn for images, mlp for the rest", choices=("auto", "mlp", "cnn"))
    shared: bool = setting(False, "policy and value share all layers but the last (else: separate networks)")
    hidden_size: int = setting(64, "width of hidden layers", 1)
    hidden_layers: int = setting(2, "number of hidden layers of an mlp", 0)
    activation: str = setting("tanh", "of an mlp", choices=("tanh", "relu"))
    log_std_init: float = setting(0.0, "continuous actions: natural logarithm of the first standard deviation")

    # Advantages and loss
    gamma: float = setting(0.99, "discount per step", 0.0, 1.0)
    lam: float = setting(0.95, "lambda of GAE (Schulman et al. 2016)", 0.0, 1.0)
    normalize_advantages: bool = setting(True, "advantages of each minibatch to mean 0 and variance 1")
    epochs: int = setting(4, "passes over each rollout", 1)
    minibatches: int = setting(4, "optimizer steps in each epoch", 1)
    clip: float = setting(0.2, "ratio clipped to 1 +- this", 0.0, 1.0)
    clip_schedule: str = setting("constant", "clip over the run", choices=("constant", "linear"))
    value_clip: float | None = setting(None, "how far a value moves per rollout before its gradient stops", above=0.0)
    value_coef: float = setting(0.5, "weight of the value loss, 0.5 (v - R)^2", 0.0)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus, per nat", 0.0)
    target_kl: float | None = setting(None, "a minibatch with a larger approx_kl (nats) ends the update", above=0.0)
    lr: float = setting(2.5e-4, "Adam's learning rate", 0.0)
    lr_schedule: str = setting("linear", "learning rate over the run", choices=("constant", "linear"))
    adam_eps: float = setting(1e-5, "Adam's epsilon", 0.0)
    max_grad_norm: float | None = setting(
        0.5, "the gradient of all weights is clipped to this norm; none: it is not", above=0.0
    )

    # Machine and output
    device: str = setting("cpu", "of the network: cpu, cuda, ...; small networks are fastest on a cpu")
    threads: int = setting(
        1, "PyTorch's threads, which the command sets; small networks are fastest with 1; 0: as they are", 0, 4096
    )
    backend: str = setting("auto", "arithmetic of the losses", choices=("auto", "triton", "torch"))
    eval_episodes: int = setting(10, "episodes of the evaluation after the last update, likeliest actions", 0)
    eval_max_steps: int = setting(100_000, "where an evaluation episode is cut: a policy may walk in circles", 1)
    record: str = setting(
        "none", "pictures of the first evaluation episode, at most 500", choices=("none", "gif", "png")
    )
    out: str | None = setting(None, "folder for metrics, TensorBoard events, checkpoints and pictures")
    tensorboard: bool = setting(True, "write TensorBoard events to OUT/tensorboard")
    save_every: int = setting(
        0,
        "checkpoint every n updates; 0: only at the end or Ctrl-C. Environments with no state to save start anew then",
        0,
    )
    resume: bool = setting(False, "continue from the newest checkpoint in OUT")
    overwrite: bool = setting(False, "replace an earlier run in OUT")
    quiet: bool = setting(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            check_setting(option.name, getattr(self, option.name), option)
        self.wrapper = tuple(self.wrapper)
        if self.num_envs * self.rollout_steps < self.minibatches:
            rollout = self.num_envs * self.rollout_steps
            raise UserError(f"minibatches must be at most num_envs * rollout_steps = {rollout}, got {self.minibatches}")
        if self.wrapper and self.vectorization == "vector_entry_point":
            raise UserError("wrapper needs vectorization = sync or async: an environment's own vector takes none")
        if self.autoreset == "same_step" and self.vectorization == "vector_entry_point":
            raise UserError("autoreset = same_step needs vectorization = sync or async: an environment's own vector")
        if self.out is None and (self.resume or self.overwrite or self.record != "none"):
            raise UserError("resume, overwrite and record need out, the folder to read and write")
        if self.resume and self.overwrite:
            raise UserError("resume continues the run in out, and overwrite replaces it: give one of them")
        if self.record != "none" and not self.eval_episodes:
            raise UserError(f"record = {self.record} needs eval_episodes of at least 1: it draws the first of them")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of ClassicConfig as options of a command line."""
    for option in dataclasses.fields(ClassicConfig):
        add_option(parser, option)
    parser.set_defaults(**{option.name: option.default for option in dataclasses.fields(ClassicConfig)})
