"""Stable-Baselines3's own PPO, as it is and with ppo_fast's advantages: one argument is all that changes.

    pip install -c constraints.txt -e ".[cpu]" "stable-baselines3==2.9.*"
    python -m ppo_fast.examples.with_sb3 [--steps N] [--seeds N]

Both learn CartPole-v1 from the same weights with the same random numbers, and drift apart by rounding. The mean return
of 100 episodes with sampled actions is measured before and after. Two minutes on a laptop.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from ppo_fast.examples.beside import Progress, failed

if TYPE_CHECKING:
    from stable_baselines3.common.buffers import RolloutBuffer

INSTALL = 'pip install -c constraints.txt -e ".[cpu]" "stable-baselines3==2.9.*"'
EPISODES = 100


def timed(kind: "type[RolloutBuffer]") -> "tuple[type[RolloutBuffer], list[float]]":
    """A rollout buffer that notes the seconds of each computation of advantages."""
    seconds: list[float] = []

    def compute(self: "RolloutBuffer", *args: object, **options: object) -> None:
        start = time.perf_counter()
        kind.compute_returns_and_advantage(self, *args, **options)
        seconds.append(time.perf_counter() - start)

    return type("Timed", (kind,), {"compute_returns_and_advantage": compute}), seconds


def compare(steps: int, seeds: int) -> list[tuple[float, ...]]:
    """For each seed: mean return before, after by SB3 and by ppo_fast, and the milliseconds of advantages of both."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.buffers import RolloutBuffer as TheirBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from ppo_fast.integrations.sb3 import RolloutBuffer

    def mean_return(model: object, seed: int) -> float:
        envs = make_vec_env("CartPole-v1", n_envs=10, seed=seed)
        return evaluate_policy(model, envs, n_eval_episodes=EPISODES, deterministic=False)[0]

    rows, runs = [], 2 * seeds
    progress = Progress("steps", runs * steps)
    progress.show(0)

    class Shown(BaseCallback):
        def __init__(self, before: int) -> None:
            super().__init__()
            self.before = before

        def _on_step(self) -> bool:
            if self.n_calls % 256 == 0:
                progress.show(self.before + min(self.num_timesteps, steps))
            return True

    for seed in range(seeds):
        before, after, ms = 0.0, [], []
        for place, kind in enumerate((TheirBuffer, RolloutBuffer)):
            buffer, seconds = timed(kind)
            model = PPO("MlpPolicy", "CartPole-v1", rollout_buffer_class=buffer, seed=seed, device="cpu")
            if place == 0:
                before = mean_return(model, 1000 + seed)
                model.set_random_seed(seed)
            model.learn(steps, callback=Shown((2 * seed + place) * steps))
            after.append(mean_return(model, 2000 + seed))
            ms.append(1000 * sorted(seconds)[(len(seconds) - 1) // 2])
        rows.append((before, *after, *ms))
    progress.show(runs * steps)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_sb3", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of each run (default: 20000)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each (default: 2)")
    options = parser.parse_args(argv)
    print(
        f"CartPole-v1: {options.steps} steps of Stable-Baselines3's PPO, as it is and with ppo_fast's advantages;"
        f" mean return of {EPISODES} episodes with sampled actions",
        flush=True,
    )
    try:
        import torch

        import ppo_fast.integrations.sb3  # noqa: F401
    except ImportError as error:
        return failed("with_sb3", error, INSTALL)
    torch.set_num_threads(1)
    rows = compare(options.steps, options.seeds)
    print("seed   before   after: SB3   with ppo_fast   ms for advantages: SB3   with ppo_fast")
    for seed, (before, theirs, ours, their_ms, our_ms) in enumerate(rows):
        print(f"{seed:4}{before:9.0f}{theirs:13.0f}{ours:16.0f}{their_ms:25.2f}{our_ms:16.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
