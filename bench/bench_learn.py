"""One update of PPO on a Llama with random weights: forward, backward, clipping and AdamW of actor and critic.

Beside ours: ours without packing, ours through the model's own logits, ours with neither; and an eager padded step in
TRL's manner (whole logits of all positions, log_softmax, an entropy for the log). All do the same work on the same
answers, of ragged lengths. FLOPs are those that the task needs: 6 for each weight of the backbones and each token,
6 N D V for the answer tokens' logits, and causal attention inside each sequence. share_of_gemm is what these FLOPs
per second are of one library GEMM of the model's own shape, measured in this process.

Needs transformers, which the other benchmarks do not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from peers import peer
from torch import Tensor

SHAPES = {  # layers, width, heads, groups, inner width, V, sequences, longest prompt, longest answer
    ("cpu", "tiny"): (2, 32, 4, 2, 64, 300, 4, 6, 8),
    ("cpu", "small"): (2, 64, 4, 2, 256, 2048, 8, 16, 32),
    ("cpu", "default"): (4, 128, 4, 4, 512, 4096, 16, 32, 64),
    ("cpu", "all"): (4, 256, 4, 4, 1024, 32000, 32, 64, 128),
    ("cuda", "tiny"): (2, 64, 4, 2, 128, 1000, 4, 16, 16),
    ("cuda", "small"): (4, 512, 8, 4, 2048, 32000, 16, 64, 128),
    ("cuda", "default"): (16, 2048, 32, 8, 8192, 128256, 48, 256, 512),  # Llama-3.2-1B, about 16k tokens
    ("cuda", "all"): (16, 2048, 32, 8, 8192, 128256, 48, 256, 512),
}
PROVIDERS = ("ppo_fast", "padded", "own logits", "padded, own logits", "eager in TRL's manner")
LONG_BEFORE = 0.05  # how far old log-probabilities are from the present ones


def make(shape: tuple[int, ...], device: torch.device, backend: str) -> tuple[Any, Any, Any, Any]:
    """The policy, a rollout of ragged lengths, its experience, and the options."""
    transformers = peer("transformers", "transformers")
    from ppo_fast.config import PPOConfig
    from ppo_fast.learn import evaluate
    from ppo_fast.packing import cut
    from ppo_fast.rollout import Rollout
    from ppo_fast.trainer import build_models

    layers, width, heads, groups, inner, V, sequences, prompt, answer = shape
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=prompt + answer,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.device(device):
        actor = transformers.LlamaForCausalLM(config)
    options = PPOConfig(
        prompts_per_step=sequences,
        minibatches=1,
        epochs=1,
        max_new_tokens=answer,
        micro_batch_tokens=16384,
        entropy_coef=0.01,
        kl_coef=0.0,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        device=device.type,
        backend=backend,
    )
    policy, _ = build_models(options, actor, None, None, device)
    prompts = torch.randint(prompt // 2, prompt + 1, (sequences,)).tolist()
    answers = torch.randint(answer // 4, answer + 1, (sequences,)).tolist()
    P, T = max(prompts), max(answers)
    tokens = torch.zeros(sequences, P + T, dtype=torch.int64)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, P - p : P + a] = torch.randint(1, V, (p + a,))
    texts = [""] * sequences
    rollout = Rollout(tokens.to(device), prompts, answers, [True] * sequences, texts, {"prompt": texts})
    packs = cut(rollout, list(range(sequences)), minibatches=1, max_tokens=options.micro_batch_tokens)
    experience = evaluate(policy, None, rollout, torch.randn(sequences, device=device), packs, options)
    experience.logprobs += LONG_BEFORE * torch.randn_like(experience.logprobs) * rollout.answer_mask
    return policy, rollout, experience, options


def flops_of(shape: tuple[int, ...], rollout: Any) -> int:
    """What the task needs, actor and critic."""
    layers, width, heads, groups, inner, V, *_ = shape
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.answer_lengths, strict=True)]
    attention = width * (2 * width + 2 * width * groups // heads)
    weights = layers * (attention + 3 * width * inner)
    scores = layers * sum(2 * width * n * n for n in lengths)  # q k^T and p v, half of each
    return 2 * (6 * weights * sum(lengths) + 3 * scores) + 6 * sum(rollout.answer_lengths) * width * V


def ours(policy: Any, rollout: Any, experience: Any, options: Any, **head: Any) -> Callable[[], Tensor]:
    from ppo_fast.learn import accumulate_gradients, cut_as, packed

    policy.head = dataclasses.replace(policy.head, **head)
    packs = cut_as(rollout, list(range(len(rollout))), options)[0]

    def run() -> Tensor:
        with packed(policy):
            return accumulate_gradients(policy, packs, experience, options)["loss"]

    return run


def eager(policy: Any, rollout: Any, experience: Any, options: Any) -> Callable[[], Tensor]:
    """The step of TRL's PPOTrainer, written anew: padded rows, and logits of every position, prompt included."""
    device, mask = rollout.tokens.device, rollout.answer_mask
    P = rollout.tokens.shape[1] - rollout.answer_width
    lengths = torch.tensor([rollout.prompt_lengths, rollout.answer_lengths], device=device).unsqueeze(-1)
    column = torch.arange(rollout.tokens.shape[1], device=device) - P
    attended = (column >= -lengths[0]) & (column < lengths[1])
    inputs = {
        "input_ids": rollout.tokens,
        "attention_mask": attended.long(),
        "position_ids": (column + lengths[0]).clamp(min=0),
        "use_cache": False,
    }

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / mask.sum()

    def run() -> Tensor:
        with policy.autocast():
            logits = policy.actor(**inputs).logits[:, P - 1 : -1]
            states = policy.critic.backbone(**inputs).last_hidden_state
            values = policy.critic(states)[:, P - 1 : -1]
        logp = torch.log_softmax(logits.float(), -1)
        chosen = logp.gather(-1, rollout.tokens[:, P:].unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        ratio = torch.exp(torch.where(mask, chosen - experience.logprobs, 0))
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        policy_loss = mean(torch.maximum(-experience.advantages * ratio, -experience.advantages * clipped))
        near = experience.values + (values - experience.values).clamp(-options.value_clip, options.value_clip)
        errors = torch.maximum((values - experience.returns) ** 2, (near - experience.returns) ** 2)
        loss = policy_loss - options.entropy_coef * mean(entropy) + options.value_coef * 0.5 * mean(errors)
        loss.backward()
        return loss.detach()

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
def test_learn(
    compare, benchmark, device: torch.device, backend: str, request: pytest.FixtureRequest, provider: str
) -> None:
    shape = SHAPES[device.type, request.config.getoption("--size")]
    policy, rollout, experience, options = make(shape, device, backend)
    from ppo_fast.learn import Optimizer

    if provider.startswith("eager"):
        gradients = eager(policy, rollout, experience, options)
    else:
        head = {"packed": False} if "padded" in provider else {}
        head |= {"linear": False} if "own logits" in provider else {}
        gradients = ours(policy, rollout, experience, options, **head)
    optimizers = [Optimizer(m, 1e-6, options) for m in (policy.actor, policy.critic)]

    def run() -> Tensor:
        loss = gradients()
        for optimizer in optimizers:
            optimizer.clip()
            optimizer.adamw.step()
            optimizer.adamw.zero_grad()
        return loss

    truth = eager(policy, rollout, experience, options)()  # in the same precision: a row that does other work shows
    policy.zero_grad()
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.answer_lengths, strict=True)]
    layers, width, _, _, inner, V, sequences, *_ = shape
    flops, dtype = flops_of(shape, rollout), torch.bfloat16 if device.type == "cuda" else torch.float32
    compare(
        run,
        operation="learn: one update of actor and critic",
        provider=provider,
        shape=f"layers={layers} D={width} V={V} sequences={sequences} tokens={sum(lengths)}",
        dtype=options.dtype,
        bytes=28 * sum(p.numel() for p in policy.parameters()),  # weight, gradient and AdamW's two, in and out
        flops=flops,
        results=lambda: [gradients()],
        truth=[truth],
    )
    info = benchmark.extra_info
    info["answer_tokens"] = sum(rollout.answer_lengths)
    info["gemm_tflop_per_s"] = measure.gemm_tflop_per_s(device, dtype, sum(lengths), inner, width)
    median = sorted(info["samples_ms"])[len(info["samples_ms"]) // 2]
    info["share_of_gemm"] = flops / (median * 1e9) / info["gemm_tflop_per_s"]
    info["tokens_per_s"] = 1e3 * sum(lengths) / median
