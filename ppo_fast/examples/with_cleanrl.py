"""PPO on CartPole as a script of one piece, in the manner of CleanRL, with ppo_fast's advantages and loss.

    pip install -c constraints.txt -e ".[classic,cpu]"
    python -m ppo_fast.examples.with_cleanrl [--plain] [--updates N] [--seed N]

`--plain` computes both in plain PyTorch instead; the curve is the same. ppo_fast/integrations/cleanrl.md explains the
lines under `if args.plain` and those under `else`. A quarter of a minute on a laptop.
"""

import argparse
import sys
import time

from ppo_fast.examples.beside import Progress, announce, failed

announce(__name__, "PPO on CartPole-v1 as a script in the manner of CleanRL, with ppo_fast's advantages and loss")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributions import Categorical  # noqa: E402

import ppo_fast as ppo  # noqa: E402

INSTALL = 'pip install -c constraints.txt -e ".[classic,cpu]"'
LOGGED = ("policy_loss", "value_loss", "entropy", "approx_kl")


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


class Agent(nn.Module):
    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.critic = nn.Sequential(layer(observations, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))
        self.actor = nn.Sequential(
            layer(observations, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, actions, 0.01)
        )

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chances = Categorical(logits=self.actor(x))
        action = chances.sample() if action is None else action
        return action, chances.log_prob(action), chances.entropy(), self.critic(x)


def train(args: argparse.Namespace) -> list[dict[str, float]]:
    """The whole script, as CleanRL has it: one function from top to bottom. A row of numbers for each update."""
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    torch.manual_seed(args.seed)
    make = [lambda: gymnasium.make("CartPole-v1") for _ in range(args.num_envs)]
    envs = SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = Agent(4, 2)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    batch_size = args.num_steps * args.num_envs
    curve, episodes = [], [0.0]

    obs = torch.zeros(args.num_steps, args.num_envs, 4)
    actions, logprobs, rewards, dones, values = (torch.zeros(args.num_steps, args.num_envs) for _ in range(5))
    next_obs = torch.from_numpy(envs.reset(seed=args.seed)[0])
    next_done, running = torch.zeros(args.num_envs), torch.zeros(args.num_envs)
    progress = Progress("update", args.updates)

    for update in range(args.updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / args.updates)
        started = time.perf_counter()
        for step in range(args.num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprobs[step], _, value = agent.get_action_and_value(next_obs)
            actions[step], values[step] = action, value.flatten()
            found, reward, terminated, truncated, _ = envs.step(action.numpy())
            next_obs, rewards[step] = torch.from_numpy(found), torch.from_numpy(reward).float()
            next_done = torch.from_numpy(terminated | truncated).float()
            running += rewards[step]
            episodes += running[next_done.bool()].tolist()
            running *= 1 - next_done
        collected = time.perf_counter()

        if args.plain:
            with torch.no_grad():
                next_value = agent.get_value(next_obs).reshape(1, -1)
                advantages, trace = torch.zeros_like(rewards), 0.0
                for t in reversed(range(args.num_steps)):
                    is_last = t == args.num_steps - 1
                    goes_on = 1.0 - (next_done if is_last else dones[t + 1])
                    following = next_value if is_last else values[t + 1]
                    delta = rewards[t] + args.gamma * following * goes_on - values[t]
                    trace = delta + args.gamma * args.gae_lambda * goes_on * trace
                    advantages[t] = trace
                returns = advantages + values
        else:
            with torch.no_grad():
                next_value = agent.get_value(next_obs).flatten()
                ended = torch.cat((dones[1:], next_done.unsqueeze(0)))
                advantages, returns = ppo.gae(
                    rewards,
                    values,
                    gamma=args.gamma,
                    lam=args.gae_lambda,
                    terminated=ended,
                    bootstrap=next_value,
                    time_major=True,
                )
        known = time.perf_counter()

        b_obs = obs.flatten(0, 1)
        b_actions, b_logprobs, b_advantages, b_returns, b_values = (
            x.flatten() for x in (actions, logprobs, advantages, returns, values)
        )
        clipfracs: list[Tensor] = []
        for mb_inds in (part for _ in range(args.update_epochs) for part in torch.randperm(batch_size).chunk(4)):
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
            mb_advantages = b_advantages[mb_inds]
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            if args.plain:
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                pg_loss = torch.max(
                    -mb_advantages * ratio, -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                ).mean()
                error = (newvalue.flatten() - b_returns[mb_inds]).square()
                if args.clip_vloss:
                    moved = (newvalue.flatten() - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                    error = torch.max(error, (b_values[mb_inds] + moved - b_returns[mb_inds]).square())
                v_loss = 0.5 * error.mean()
                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
                with torch.no_grad():
                    approx_kl = (ratio - 1 - logratio).mean()
                    clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean())
            else:
                out = ppo.ppo_loss(
                    newlogprob,
                    newvalue.flatten(),
                    b_logprobs[mb_inds],
                    b_values[mb_inds],
                    mb_advantages,
                    b_returns[mb_inds],
                    clip_low=args.clip_coef,
                    clip_high=args.clip_coef,
                    value_coef=args.vf_coef,
                    value_clip=args.clip_coef if args.clip_vloss else None,
                    entropy=entropy,
                    entropy_coef=args.ent_coef,
                )
                loss, pg_loss, v_loss, entropy_loss, approx_kl = out.loss, *(out.stats[name] for name in LOGGED)
                clipfracs.append(out.stats["clip_fraction"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

        seconds = {"advantages": known - collected, "learn": time.perf_counter() - known, "sample": collected - started}
        numbers = dict(zip(LOGGED, (pg_loss.item(), v_loss.item(), entropy_loss.item(), approx_kl.item()), strict=True))
        curve.append({**numbers, "return": sum(episodes[-20:]) / max(len(episodes[-20:]), 1), **seconds})
        if not args.quiet and (update % 10 == 9 or update == args.updates - 1):
            clipped = torch.stack(clipfracs).mean()
            print(
                f"update {update + 1:4}  steps {(update + 1) * batch_size:7}  return {curve[-1]['return']:6.1f}  "
                f"value loss {v_loss:8.3f}  entropy {entropy_loss:.3f}  KL {approx_kl:.4f}  clipped {clipped:.3f}  "
                f"{progress.left(update + 1)}",
                flush=True,
            )
    envs.close()
    return curve


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_cleanrl", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--plain", action="store_true", help="advantages and loss in plain PyTorch")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the last line")
    numbers = {
        "updates": (100, "rollouts, each followed by learning"),
        "seed": (0, "seed of everything random"),
        "num-envs": (4, "environments"),
        "num-steps": (128, "steps of each environment in a rollout"),
        "update-epochs": (4, "times that a rollout is learned from, in 4 minibatches"),
        "learning-rate": (2.5e-4, "of Adam, falling to 0"),
        "gamma": (0.99, "discount"),
        "gae-lambda": (0.95, "lambda of GAE"),
        "clip-coef": (0.2, "clip of the ratio, and of the value"),
        "ent-coef": (0.01, "weight of the entropy bonus"),
        "vf-coef": (0.5, "weight of the value loss"),
        "max-grad-norm": (0.5, "the gradient's norm is clipped to it"),
    }
    for name, (value, text) in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (default: {value})")
    parser.add_argument("--clip-vloss", action=argparse.BooleanOptionalAction, default=True, help="clip the value loss")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    torch.set_num_threads(1)
    try:
        curve = train(args)
    except ImportError as error:
        return failed("with_cleanrl", error, INSTALL)
    parts = (1000 * sum(row[part] for row in curve[1:]) / max(len(curve) - 1, 1) for part in ("advantages", "learn"))
    print("{:.2f} ms for advantages and {:.1f} ms for learning in an update".format(*parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
