"""Small runs of the trainer, the same on each device: models, rows, rewards and what is compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.tiny import byte_tokenizer, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.random_state import RandomState
from ppo_fast.llm.sampler import Completions, SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

TEXTS = ("hi", "what time is it", "a", "the fox jumps", "over", "it all")
ROWS = [{"prompt": text, "weight": float(i)} for i, text in enumerate(TEXTS)]
HELD_OUT = [{"prompt": "held out", "weight": 1.0}, {"prompt": "me too", "weight": 2.0}]
END = 256


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def of_each_token(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[list[float]]:
    return [[0.1 * (i % 3) for i in ids] for ids in completion_ids]


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tokens = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=None, eos_token_id=END, pad_token_id=257)
    return LlamaForSequenceClassification(LlamaConfig(**shape, **tokens, num_key_value_heads=1, num_labels=1)).eval()


def reward_model(device: torch.device | str) -> RewardModel:
    return RewardModel(classifier(), byte_tokenizer(), device=torch.device(device))


def llama(*, seed: int = 0) -> PreTrainedModel:
    """tiny_llama with larger weights: its logits are almost equal, so that wrong attention would hardly show."""
    model = tiny_llama(258, seed=seed)
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim > 1:
                x.mul_(4.0)
    return model


class FixedAnswers:
    """Answers that depend on the prompt only, so that rounding in the actor changes no token."""

    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
        lengths = [1 + sum(prompt) % params.max_new_tokens for prompt in prompts]
        ended = [length < params.max_new_tokens for length in lengths]
        ids = [
            [(7 * i + sum(prompt)) % 255 for i in range(length - end)] + [END] * end
            for prompt, length, end in zip(prompts, lengths, ended, strict=True)
        ]
        return Completions(ids, ended)


def config(device: torch.device | str, **options: Any) -> PPOConfig:
    small = dict(total_steps=2, prompts_per_step=6, max_new_tokens=7, minibatches=2, micro_batch_tokens=40, epochs=2)
    quick = dict(lr=1e-3, critic_lr=1e-3, quiet=True, device=str(device), backend="torch", save_every=0)
    quick["dtype"] = "float32"
    quick["adam_eps"] = 1e-3  # a gradient that is nearly 0 must not decide a whole update
    return PPOConfig(**{**small, **quick, "tensorboard": False, **options})


def trainer(
    device: torch.device | str,
    *,
    actor: Any = None,
    rewards: Any = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> PPOTrainer:
    """`given` are further arguments of PPOTrainer; `options` are those of PPOConfig."""
    actor = llama() if actor is None else actor
    rewards = vowels if rewards is None else rewards
    made = PPOTrainer(config(device, **options), actor, byte_tokenizer(), ROWS, rewards, **(given or {}))
    torch.manual_seed(7)  # all generators: a CPU's has made the critic before, that of a device has not
    made.random = RandomState.capture(made.device)
    return made


TIMED = ("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")


def metrics(row: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the machine."""
    return {name: value for name, value in row.items() if not name.startswith(TIMED)}


def assert_same_metrics(ours: list[dict], theirs: list[dict], *, rtol: float, atol: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(map(metrics, ours), map(metrics, theirs), strict=True):
        assert a.keys() == b.keys()
        wrong = {name: (a[name], b[name]) for name in a if abs(a[name] - b[name]) > atol + rtol * abs(b[name])}
        assert not wrong, wrong


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    """All weights of actor and critic, on the CPU."""
    return {name: x.detach().cpu() for name, x in made.policy.named_parameters()}


def off_device(made: PPOTrainer) -> set[str]:
    """Devices of weights, buffers, gradients' moments and reference that are not the trainer's."""
    modules = [made.policy] + ([made.reference] if isinstance(made.reference, torch.nn.Module) else [])
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    for optimizer in (made.learner.optimizers.actor, made.learner.optimizers.critic):
        tensors += [state[name] for state in optimizer.adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {str(x.device) for x in tensors} - {str(made.device)}


@contextmanager
def unallocated(device: torch.device) -> Iterator[None]:
    """Nothing inside is allocated on this device."""
    module = torch.get_device_module(device)
    allocations = module.memory_stats(device)["allocation.all.allocated"]
    yield
    assert module.memory_stats(device)["allocation.all.allocated"] == allocations, f"memory of {device} was allocated"


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Nor is a random number taken from its generator. (`transformers.set_seed` seeds those of all devices.)"""
    state = torch.get_device_module(device).get_rng_state(device)
    with unallocated(device):
        yield
    found = torch.get_device_module(device).get_rng_state(device)
    assert torch.equal(found, state), f"the generator of {device} was used"


PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": dict(parallel="ddp"),
    "fsdp": dict(parallel="fsdp"),
    "fsdp, shared critic, gradient checkpointing": dict(
        parallel="fsdp", critic="shared", gradient_checkpointing=True, kl_in="loss"
    ),
    "fsdp, bf16": dict(parallel="fsdp", dtype="bfloat16"),
}


def parallel_run(device: torch.device, given: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The history of one of two processes, which leaves the device of the other alone."""
    other = torch.device(device.type, 1 - device.index)
    with unallocated(other):
        made = trainer(device.type, given=given, micro_batch_tokens=24, **options)
    assert made.device == device
    with untouched(other):
        history = made.train()
    assert not off_device(made)
    return history


def parallel_runs(device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """All runs with fixed answers, which do not depend on the number of processes, and one with the actor's own."""
    fixed = {"sampler": FixedAnswers()}
    found = {name: parallel_run(device, fixed, **PARALLEL[name]) for name in PARALLEL}
    return {**found, "fsdp, own samples": parallel_run(device, {}, parallel="fsdp", total_steps=1)}
