"""A PPO script of torchrl with ppo_fast's advantages and loss: one import is all that changes.

pip install -c constraints.txt -e ".[cpu]" "torchrl==0.14.*" gymnasium
python -m ppo_fast.examples.with_torchrl [--steps N]
"""

import argparse
import sys

from ppo_fast.common.errors import print_error
from ppo_fast.examples.beside import Progress, failed

INSTALL = 'pip install -c constraints.txt -e ".[cpu]" "torchrl==0.14.*" gymnasium'
ROLLOUT, ROWS, EPOCHS = 1024, 128, 8  # steps of a rollout and of a mini-batch, passes over a rollout


def train(GAE: type, ClipPPOLoss: type, steps: int) -> list[float]:
    """Learn CartPole-v1 with torchrl's collector and networks; the return of every episode, in order."""
    import torch
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymEnv, RewardSum, TransformedEnv
    from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator

    torch.manual_seed(0)
    env = TransformedEnv(GymEnv("CartPole-v1"), RewardSum())
    env.set_seed(0)
    widths = {"num_cells": [64, 64], "activation_class": torch.nn.Tanh}
    policy = ProbabilisticActor(
        TensorDictModule(MLP(in_features=4, out_features=2, **widths), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=env.action_spec,
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(in_features=4, out_features=1, **widths), in_keys=["observation"])
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(policy, critic, loss_critic_type="l2", critic_coeff=0.5, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    returns: list[float] = []
    done = 0
    options = {"frames_per_batch": ROLLOUT, "total_frames": steps, "auto_register_policy_transforms": True}
    collector = Collector(env, policy, **options)
    progress = Progress("steps", steps)
    progress.show(0)
    for rollout in collector:
        gae(rollout)
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROLLOUT).split(ROWS):
                out = loss(rollout[rows])
                (out["loss_objective"] + out["loss_entropy"] + out["loss_critic"]).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        returns += rollout["next", "episode_reward"][rollout["next", "done"]].tolist()
        done += ROLLOUT
        progress.show(min(done, steps))
    collector.shutdown()
    return returns


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_torchrl", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20_480, help="environment steps (default: 20480)")
    steps = parser.parse_args(argv).steps
    print(f"CartPole-v1: {steps} steps of a PPO script of torchrl, with ppo_fast's advantages and loss", flush=True)
    try:
        import gymnasium  # noqa: F401

        from ppo_fast.integrations.torchrl import GAE, ClipPPOLoss  # not torchrl.objectives' ClipPPOLoss and value.GAE
    except ImportError as error:
        return failed("with_torchrl", error, INSTALL)
    returns = train(GAE, ClipPPOLoss, steps)
    if len(returns) < 20:
        print_error(f"with_torchrl: {len(returns)} episodes ended in {steps} steps: take more")
        return 1
    first, last = (sum(x) / len(x) for x in (returns[:10], returns[-10:]))
    print(f"CartPole-v1, mean return of 10 episodes: {first:.0f} at first, {last:.0f} after {steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
