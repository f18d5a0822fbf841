"""Stable-Baselines3's own PPO with ppo_fast's advantages: one argument is all that changes.

python -m ppo_fast.examples.with_sb3 [--steps N]
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_sb3", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps (default: 20000)")
    steps = parser.parse_args(argv).steps
    try:
        from ppo_fast.integrations.sb3 import RolloutBuffer
    except ImportError as error:
        print(f"with_sb3: error: {error}", file=sys.stderr)
        return 1
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy

    model = PPO("MlpPolicy", "CartPole-v1", rollout_buffer_class=RolloutBuffer, seed=0, device="cpu")
    before, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    model.learn(steps)
    after, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"CartPole-v1, mean return of 10 episodes: {before:.0f} before, {after:.0f} after {steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
