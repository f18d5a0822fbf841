"""Counted FLOPs of learning against those that torch.utils.flop_counter sees in the same learn step."""

import json
import math

import pytest
import torch
from support.tiny import PROMPTS, byte_tokenizer, distinct, tiny_actor, tiny_llama, tiny_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.flops import LearnFlops, decoder_flops
from ppo_fast.llm.learn import Learner
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import decoder_of, text_config
from ppo_fast.llm.optimizer import Optimizer, Optimizers
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.trainer import PPOTrainer

PROMPT, ANSWER, COUNT = 5, 7, 6
CPU = torch.device("cpu")


def learner_of(family: str, **options: object) -> Learner:
    small = {"epochs": 2, "minibatches": 2, "kl_coef": 0.0, "prompts_per_step": COUNT, "max_new_tokens": ANSWER}
    config = PPOConfig(**{**small, **options})
    # a wider model, in which parts that are not matrices matter less
    policy, reference = build_models(config, tiny_actor(family, hidden=64), None, None, CPU)
    optimizers = Optimizers(Optimizer(policy.actor, 1e-6, config), Optimizer(policy.critic, 1e-6, config))
    return Learner(policy, reference, optimizers, config)


def rollout_of(length: int = ANSWER) -> Rollout:
    tokens = torch.randint(0, 256, (COUNT, PROMPT + length), generator=torch.Generator().manual_seed(0))
    return Rollout.from_lengths(tokens, [PROMPT] * COUNT, [length] * COUNT)


def seen_and_counted(learner: Learner, *, train_actor: bool = True) -> tuple[float, float]:
    """FLOPs of `Learner.update` that PyTorch's counter sees, and ours, with attention in full as PyTorch computes"""
    rollout = rollout_of()
    experience = learner.make_experience(rollout, torch.randn(COUNT))
    # the math kernel consists of products that the counter knows; it computes the whole square of each sequence
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        history = learner.update(experience, train_actor=train_actor)
    flops = LearnFlops(learner.policy)
    total = flops.of_updates(rollout, history, learner.config.minibatches)
    lengths, square = [PROMPT + ANSWER] * COUNT, 2 * (PROMPT + ANSWER) / (PROMPT + ANSWER + 1)
    for part, learns in ((flops.actor, train_actor), (flops.critic, True)):
        if part is not None and (learns or flops.critic is None or part is flops.critic):
            pairs = sum(n * (n + 1) // 2 for n in lengths)
            attention = sum(part.attention.values()) * pairs * (3 if learns else 1) * learner.config.epochs
            total += (square - 1) * attention
    return counter.get_total_flops(), total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["shared", "own"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_counted_flops_are_those_that_pytorch_sees(family, critic, lora_rank):
    options = {} if not lora_rank else {"lora_rank": lora_rank, "lora_alpha": 8}
    if lora_rank:
        pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')
    seen, counted = seen_and_counted(learner_of(family, critic=critic, **options))
    # the first layer's keys and values pass no gradient on under LoRA; there are two layers here
    assert counted == pytest.approx(seen, rel=0.05 if lora_rank else 0.005)


@pytest.mark.parametrize("critic", ["shared", "own"])
def test_a_warm_up_step_of_the_critic_trains_no_actor(critic):
    learner = learner_of("llama", critic=critic)
    seen, counted = seen_and_counted(learner, train_actor=False)
    assert counted == pytest.approx(seen, rel=0.005)
    assert counted < 0.7 * seen_and_counted(learner)[1]


def test_recomputed_layers_do_not_count():
    plain = seen_and_counted(learner_of("llama", critic="shared"))
    again = seen_and_counted(learner_of("llama", critic="shared", gradient_checkpointing=True))
    assert again[1] == plain[1]
    assert again[0] > 1.1 * plain[0], "PyTorch sees them"


def test_flops_of_a_llama_by_hand():
    """Hidden size 32, inner size 64, 4 heads of 8, 2 groups, 2 layers, 258 tokens; 12 of 2 sequences of 4 and 8."""
    learner = learner_of("llama", critic="shared")
    config = PPOConfig(critic="shared", kl_coef=0.0)
    policy, _ = build_models(config, tiny_llama(), None, None, CPU)
    del learner
    rollout = Rollout.from_lengths(torch.zeros(2, 7, dtype=torch.int64), [1, 3], [3, 4])
    rollout.tokens = torch.zeros(2, 3 + 4, dtype=torch.int64)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    tokens, counted, pairs = 4 + 7, 3 + 4, 4 * 5 // 2 + 7 * 8 // 2
    by_hand = 6 * 2 * layer * tokens + 2 * 12 * 4 * 8 * pairs + 6 * 32 * 258 * counted + 6 * 32 * counted
    assert LearnFlops(policy).of_epoch(rollout, train_actor=True) == by_hand


def test_frozen_lower_layers_pass_no_gradient_on():
    model = tiny_llama()
    whole = decoder_flops(decoder_of(model), text_config(model))
    assert whole.backward == 2 * whole.forward
    model.requires_grad_(False)
    assert not decoder_flops(decoder_of(model), text_config(model)).learns
    model.model.layers[1].mlp.requires_grad_(True)
    upper = decoder_flops(decoder_of(model), text_config(model))
    # the last MLP alone: its two inputs get a gradient of their weight, and the third that of its input, too
    mlp = 32 * 64
    assert upper.backward == 3 * 2 * mlp + 2 * 2 * mlp


def test_each_layer_counts_the_keys_in_its_window():
    model = tiny_llama()
    config = text_config(model)
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 3
    attention = decoder_flops(decoder_of(model), config).attention
    assert attention == {None: 4.0 * 32, 3: 4.0 * 32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_step_logs_mfu_and_peak_memory(dtype, tmp_path):
    trainer = tiny_trainer("llama", dtype, CPU, out=str(tmp_path / "run"), tensorboard=True)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["mfu"] < 1.5  # of a rate that was measured beside other work
        assert row["mfu"] == pytest.approx(1e12 * row["learn_tflops"] / trainer.peak_rate)
        assert row["memory_mib"] > 50
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason='tensorboard is not installed: pip install "ppo_fast[train]"',
    )
    events = accumulator.EventAccumulator(str(next((tmp_path / "run").rglob("events.*")).parent))
    events.Reload()
    for name in ("mfu", "learn_tflops", "memory_mib"):
        assert len(events.Scalars(name)) == 2


def test_without_a_known_rate_there_is_no_mfu(monkeypatch):
    monkeypatch.setattr("ppo_fast.llm.trainer.peak_rate", lambda device, dtype: None)
    metrics = tiny_trainer("llama", "float32", CPU).step()
    assert "mfu" not in metrics
    assert metrics["learn_tflops"] > 0


def test_an_own_critic_counts_its_backbone():
    shared, own = (
        LearnFlops(build_models(PPOConfig(critic=kind, kl_coef=0.0), tiny_llama(), None, None, CPU)[0])
        for kind in ("shared", "own")
    )
    rollout = rollout_of()
    extra = own.of_epoch(rollout, train_actor=True) - shared.of_epoch(rollout, train_actor=True)
    assert extra == own.actor.total([PROMPT + ANSWER] * COUNT, learns=True)
    assert math.isclose(shared.value_head, 6 * 32)
    assert Critic.shared(tiny_llama()).head.in_features == 32


def test_the_trainer_counts_the_same_tokens_in_each_step():
    trainer = PPOTrainer(
        PPOConfig(total_steps=1, prompts_per_step=4, max_new_tokens=3, epochs=1, minibatches=2, quiet=True),
        tiny_llama(),
        byte_tokenizer(),
        [{"prompt": text} for text in PROMPTS],
        distinct,
    )
    metrics = trainer.step()
    flops = trainer.flops.of_epoch(trainer.last_rollout, train_actor=True)
    assert 1e12 * metrics["learn_tflops"] * metrics["seconds/learn"] == pytest.approx(flops)
