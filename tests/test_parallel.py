"""Two processes equal one on the joined batch: DDP and FSDP2, with gloo on a CPU.

The processes are forked from a server that has everything imported.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import time
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import byte_tokenizer, save_tiny_model, tiny_llama
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from ppo_fast.config import PPOConfig
from ppo_fast.errors import UserError
from ppo_fast.learn import accumulate_gradients, cut_as, evaluate, packed
from ppo_fast.parallel import World, full, join_rollouts, start
from ppo_fast.reward import score
from ppo_fast.rollout import Rollout
from ppo_fast.sample import Answers, generate, respond
from ppo_fast.trainer import PPOTrainer

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ppo_fast.trainer", "torch.utils.tensorboard"])
CPU = torch.device("cpu")
TEXTS = ("hi", "what time is it", "a", "the fox jumps over it", "no", "well", "seven")
ROWS = [{"prompt": text, "bonus": float(i)} for i, text in enumerate(TEXTS)]


class Fixed:
    """A sampler whose answers depend on prompt and step alone, not on the process that asks."""

    def __init__(self) -> None:
        self.step = 0

    def sample(self, prompts: list[list[int]], config: PPOConfig) -> Answers:
        self.step += 1
        ids, ended = [], []
        for prompt in prompts:
            words = torch.Generator().manual_seed(zlib.crc32(bytes(i % 256 for i in prompt)) + self.step)
            length = int(torch.randint(1, config.max_new_tokens + 1, (1,), generator=words))
            ids.append(torch.randint(0, 256, (length,), generator=words).tolist())
            ended.append(length % 2 == 0)
        return Answers(ids, ended)


def judge(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], bonus: list[float]
) -> list[float]:
    return [sum(i % 7 for i in ids) / 10 + b for ids, b in zip(completion_ids, bonus, strict=True)]


def options(**changes) -> PPOConfig:
    small = dict(
        total_steps=3,
        prompts_per_step=5,  # three for one process, two for the other
        max_new_tokens=9,
        minibatches=2,
        epochs=2,
        micro_batch_tokens=24,
        lr=1e-3,
        critic_lr=1e-3,
        adam_eps=1e-3,  # a gradient that is nearly zero must not decide a whole step
        quiet=True,
        device="cpu",
        tensorboard=False,
    )
    return PPOConfig(**{**small, **changes})


def trainer_of(config: PPOConfig, *, rows=ROWS, **others) -> PPOTrainer:
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), rows, judge, **others)


def first_gradient(config: PPOConfig) -> tuple[dict[str, torch.Tensor], dict[str, float], bool]:
    """Gradient and statistics of the first minibatch, whole, and whether parameters are sharded."""
    trainer = trainer_of(config, sampler=Fixed())
    world, policy = trainer.world, trainer.policy
    torch.nn.init.constant_(trainer.critic.head.bias, 0.1)
    mine = respond(trainer.sampler, trainer.tokenizer, world.share(ROWS[:5]), config, CPU)
    scores, _ = score(mine, trainer.rewards, config)
    rollout, scores = world.join(mine, scores, 257)
    minibatches = cut_as(rollout, list(range(5)), config, world)
    experience = evaluate(policy, trainer.reference, rollout, scores, minibatches, config, world=world)
    from ppo_fast.learn import filler_of

    with packed(policy):
        stats = accumulate_gradients(
            policy, minibatches[0], experience, config, world=world, filler=filler_of(rollout), kl_coef=0.05
        )
    gradient = {name: full(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
    sharded = all(isinstance(p, DTensor) for p in policy.parameters())
    return gradient, {name: x.item() for name, x in stats.items()}, sharded


def three_steps(config: PPOConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer = trainer_of(config, sampler=Fixed())
    history = trainer.train()
    return of_training(history), {name: full(p.detach()) for name, p in trainer.policy.named_parameters()}


def of_training(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "memory"))} for row in history]


def run(tmp_path: Path, function, *arguments, size: int = 2) -> list:
    """The function's result in each of several processes."""
    store = tmp_path / f"store-{time.monotonic_ns()}"
    children = [SERVER.Process(target=_child, args=(r, size, store, function, arguments)) for r in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode is not None, "the processes hang"
    found = [pickle.loads(Path(f"{store}.{rank}").read_bytes()) for rank in range(size)]
    for error in found:
        if isinstance(error, str):
            raise AssertionError(error)
    return found


def _child(rank: int, size: int, store: Path, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = function(*arguments)
    except Exception:  # the test shows it
        result = traceback.format_exc()
    Path(f"{store}.{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def assert_close(here: dict, there: dict, tolerance: float = 1e-5) -> None:
    assert here.keys() == there.keys()
    for name, x in here.items():
        x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (x, there[name]))
        gap = (x - y).abs().max() / max(1.0, y.abs().max())
        assert gap <= tolerance, f"{name}: {gap:.1e} apart"


CASES = [
    {},
    {"critic": "shared", "entropy_coef": 0.01},
    {"kl_in": "loss", "aggregation": "seq-mean-token-mean", "gradient_checkpointing": True},
    {"critic_warmup_steps": 1, "kl_controller": "adaptive", "kl_horizon": 20.0, "samples_per_prompt": 1},
]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: "+".join(case) or "default")
def test_the_gradient_of_two_processes_differs_from_that_of_one(tmp_path, parallel, case):
    expected, stats, _ = first_gradient(options(**case))
    for gradient, its_stats, sharded in run(tmp_path, first_gradient, options(**case, parallel=parallel)):
        assert_close(gradient, expected)
        assert_close(its_stats, stats)
        assert sharded == (parallel == "fsdp"), "parameters are DTensors under fsdp, and only there"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case) or "default")
def test_three_steps_of_two_processes_differ_from_those_of_one(tmp_path, parallel, case):
    history, weights = three_steps(options(**case))
    for its_history, its_weights in run(tmp_path, three_steps, options(**case, parallel=parallel)):
        for here, there in zip(its_history, history, strict=True):
            assert_close(here, there)
        assert_close(its_weights, weights)
