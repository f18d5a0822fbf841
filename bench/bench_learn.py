"""One learn step of PPO on a Llama with random weights: advantages, forward, backward, clipping and AdamW.

Rows besides ours: ours without packing, without the linear loss (the model's own logits instead), without fused
advantages (a loop over time in plain PyTorch), without all three; and an eager padded step in TRL's manner (whole
logits of all positions, log_softmax, an entropy for the log). All do the same work on the same answers, of ragged
lengths, with old log-probabilities and values given. FLOPs are those that the task needs: 6 for each weight of the
backbones and each token, 6 N D V for the answer tokens' logits, and causal attention inside each sequence; their floor
is one library GEMM of the model's own shape.

Amdahl: each row also has the times of its parts, each measured alone (head and loss: the time of the gradients
less the backbones' forward and backward). A part with the share s of a step can make it at most 1 / (1 - s) times as
fast.

A row whose memory, by calculation, exceeds what the GPU has free is skipped with both numbers, and so is the comparison
with the eager step's loss; so each GPU gets the rows that fit it.

Needs transformers, which the other benchmarks do not.
"""

import dataclasses
import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import pytest
import torch
from peers import peer
from torch import Tensor

SHAPES = {  # layers, width, heads, groups, inner width, V, sequences, longest prompt, longest answer
    ("cpu", "tiny"): [(2, 32, 4, 2, 64, 300, 4, 6, 8)],
    ("cpu", "small"): [(2, 64, 4, 2, 256, 2048, 8, 16, 32)],
    ("cpu", "default"): [(4, 128, 4, 4, 512, 4096, 16, 32, 64)],
    ("cpu", "all"): [(4, 256, 4, 4, 1024, 32000, 32, 64, 128)],
    ("cuda", "tiny"): [(1, 32, 4, 2, 64, 130, 2, 4, 4)],
    ("cuda", "small"): [(4, 512, 8, 4, 2048, 32000, 16, 64, 128)],
    ("cuda", "default"): [
        (8, 1024, 16, 8, 4096, 128256, 8, 128, 256),  # most rows fit 24 GiB
        (16, 2048, 32, 8, 8192, 128256, 12, 256, 512),  # Llama-3.2-1B; eager takes about 95 GiB
    ],
    ("cuda", "all"): [(16, 2048, 32, 8, 8192, 128256, 16, 256, 512)],
}
EAGER = "eager in TRL's manner"
PROVIDERS = {  # and what is switched off
    "ppo_fast": (),
    "ppo_fast without packing": ("packing",),
    "ppo_fast without the linear loss": ("linear loss",),
    "ppo_fast without fused advantages": ("fused advantages",),
    "ppo_fast without all three": ("packing", "linear loss", "fused advantages"),
    EAGER: (),
}
OPERATION = "learn step of actor and critic"
MICRO_BATCH_TOKENS = 16384
LONG_BEFORE = 0.05  # how far old log-probabilities are from the present ones


class Task(NamedTuple):
    policy: Any
    rollout: Any  # of ragged lengths
    scores: Tensor  # [B]
    experience: Any
    options: Any


def make(shape: tuple[int, ...], device: torch.device, backend: str) -> Task:
    transformers = peer("transformers", "transformers")
    from ppo_fast.llm.config import PPOConfig
    from ppo_fast.llm.experience import ExperienceMaker
    from ppo_fast.llm.models.build import build_models
    from ppo_fast.llm.packing.rollout import Rollout

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
        micro_batch_tokens=MICRO_BATCH_TOKENS,
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
    rollout = Rollout.from_lengths(tokens, prompts, answers, device=device)
    scores = torch.randn(sequences, device=device)
    experience = ExperienceMaker(policy, None, options).make(rollout, scores)
    experience.logprobs += LONG_BEFORE * torch.randn_like(experience.logprobs) * experience.mask
    return Task(policy, rollout, scores, experience, options)


def flops_of(shape: tuple[int, ...], rollout: Any) -> int:
    """FLOPs that the task needs, for actor and critic."""
    layers, width, heads, groups, inner, V, *_ = shape
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.completion_lengths, strict=True)]
    attention = width * (2 * width + 2 * width * groups // heads)
    weights = layers * (attention + 3 * width * inner)
    scores = layers * sum(2 * width * n * n for n in lengths)  # q k^T and p v, half of each
    return 2 * (6 * weights * sum(lengths) + 3 * scores) + 6 * sum(rollout.completion_lengths) * width * V


def needed_bytes(shape: tuple[int, ...], provider: str) -> int:
    """Estimate the peak of a step in bf16 over fp32 weights, within about 20 %: a row that fits is then measured.

    Weights, gradients and AdamW's two moments, and the bf16 copies of autocast, for actor and critic; activations of
    both; logits and their gradients. Eager holds the logits of every padded position, and fp32 copies of those of the
    answers in log_softmax, p, p log p and their gradients.
    """
    layers, width, heads, groups, inner, V, sequences, prompt, answer = shape
    off = PROVIDERS[provider]
    parameters = V * width + layers * (width * (2 * width + 2 * width * groups // heads) + 3 * width * inner)
    full = provider == EAGER or "packing" in off  # padded rows; else about three quarters of each prompt and answer
    tokens = sequences * (prompt + answer) if full else sequences * (3 * prompt + 3 * answer) // 4
    answers = sequences * answer if provider == EAGER else sequences * 5 * answer // 8
    activations = 2 * layers * min(tokens, MICRO_BATCH_TOKENS) * (30 * width + 8 * inner)
    if provider == EAGER:
        logits = tokens * V * 4 + answers * V * 24
    elif "linear loss" in off:
        logits = tokens * V * 4 + answers * V * 12
    else:
        logits = min(answers, 4096) * V * 8 + V * width * 4
    return 2 * parameters * 18 + activations + logits


def why_not(shape: tuple[int, ...], provider: str, free: int) -> str | None:
    """Return the reason why a row cannot be measured with `free` bytes; None if it is measured."""
    needed = needed_bytes(shape, provider)
    if needed <= free:
        return None
    return f"{provider} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None elsewhere."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def loss_of_eager(task: Task, shape: tuple[int, ...], free: int | None, info: dict[str, Any]) -> list[Tensor] | None:
    """Compute the eager step's loss, to detect rows that do other work; None, with the reason, if it cannot fit."""
    reason = None if free is None else why_not(shape, EAGER, free)
    if reason is None:
        plain = eager(task)
        try:
            return [plain.gradients(plain.advantages())]
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
    info["not_compared"] = reason
    return None


def fused_advantages(task: Task) -> Callable[[], Any]:
    import ppo_fast as ppo

    known, o = task.experience, task.options
    settings = dict(kl_coef=0.0, gamma=o.gamma, lam=o.lam, backend=o.backend)

    def run() -> Any:
        out = ppo.rlhf_advantages(task.scores, known.logprobs, known.logprobs, known.values, known.mask, **settings)
        return dataclasses.replace(known, advantages=out.advantages, returns=out.returns)

    return run


def plain_advantages(task: Task) -> Callable[[], Any]:
    """Advantages as in trainers without a kernel: the score at the last token, a loop over time, masked whitening."""
    known, o, mask = task.experience, task.options, task.experience.mask
    last = torch.tensor(task.rollout.completion_lengths, device=mask.device).unsqueeze(1) - 1

    def run() -> Any:
        rewards = torch.zeros_like(known.values).scatter_(1, last, task.scores.unsqueeze(1))
        trace = following = torch.zeros_like(task.scores)
        steps = []
        for t in reversed(range(mask.shape[1])):
            trace = rewards[:, t] + o.gamma * following - known.values[:, t] + o.gamma * o.lam * trace
            following = known.values[:, t]
            steps.append(trace)
        raw = torch.stack(steps[::-1], 1) * mask
        mean = raw.sum() / mask.sum()
        variance = (((raw - mean) * mask) ** 2).sum() / (mask.sum() - 1)
        advantages = (raw - mean) * torch.rsqrt(variance + 1e-8) * mask
        return dataclasses.replace(known, advantages=advantages, returns=(raw + known.values) * mask)

    return run


class Parts(NamedTuple):
    """The parts of one step, each a separate call."""

    advantages: Callable[[], Any]
    gradients: Callable[[Any], Tensor]  # of the experience; returns the loss
    backbones: Callable[[], None]  # forward and backward of both, without head and loss


def ours(task: Task, off: tuple[str, ...]) -> Parts:
    from ppo_fast.llm.experience import ExperienceMaker
    from ppo_fast.llm.learn import Learner
    from ppo_fast.llm.models.head import decoder_of, hidden_states
    from ppo_fast.llm.models.policy import packed_mode
    from ppo_fast.llm.optimizer import Optimizer, Optimizers

    policy, rollout, options = task.policy, task.rollout, task.options
    kept = {"packed": "packing" not in off, "linear": "linear loss" not in off}
    policy.head, policy.critic_head = (dataclasses.replace(x, **kept) for x in (policy.head, policy.critic_head))
    (packs,) = ExperienceMaker(policy, None, options).split_minibatches(rollout, range(len(rollout)))
    optimizers = Optimizers(Optimizer(policy.actor, options.lr, options), Optimizer(policy.critic, options.lr, options))
    learner = Learner(policy, None, optimizers, options)

    def gradients(experience: Any) -> Tensor:
        with packed_mode(policy):
            return learner.accumulate_gradients(packs, experience)["loss"]

    def backbones() -> None:
        with packed_mode(policy):
            for pack in packs:
                with policy.autocast():
                    models = ((decoder_of(policy.actor), policy.head), (policy.critic.backbone, policy.critic_head))
                    states = [hidden_states(m, pack, head) for m, head in models]
                torch.autograd.backward(states, states)

    advantages = plain_advantages(task) if "fused advantages" in off else fused_advantages(task)
    return Parts(advantages, gradients, backbones)


def eager(task: Task) -> Parts:
    """The step of TRL's PPOTrainer, reimplemented: padded rows, and logits of every position, prompt included."""
    policy, rollout, options = task.policy, task.rollout, task.options
    device, mask = rollout.device, rollout.mask.to(rollout.device)
    tokens = rollout.tokens.to(device)
    P = rollout.tokens.shape[1] - rollout.completion_width
    lengths = torch.tensor([rollout.prompt_lengths, rollout.completion_lengths], device=device).unsqueeze(-1)
    column = torch.arange(rollout.tokens.shape[1], device=device) - P
    attended = (column >= -lengths[0]) & (column < lengths[1])
    inputs = {
        "input_ids": tokens,
        "attention_mask": attended.long(),
        "position_ids": (column + lengths[0]).clamp(min=0),
        "use_cache": False,
    }

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / mask.sum()

    def gradients(experience: Any) -> Tensor:
        with policy.autocast():
            logits = policy.actor(**inputs).logits[:, P - 1 : -1]
            states = policy.critic.backbone(**inputs).last_hidden_state
            values = policy.critic(states)[:, P - 1 : -1]
        logp = torch.log_softmax(logits.float(), -1)
        chosen = logp.gather(-1, tokens[:, P:].unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        ratio = torch.exp(torch.where(mask, chosen - experience.logprobs, 0))
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        policy_loss = mean(torch.maximum(-experience.advantages * ratio, -experience.advantages * clipped))
        near = experience.values + (values - experience.values).clamp(-options.value_clip, options.value_clip)
        errors = torch.maximum((values - experience.returns) ** 2, (near - experience.returns) ** 2)
        loss = policy_loss - options.entropy_coef * mean(entropy) + options.value_coef * 0.5 * mean(errors)
        loss.backward()
        return loss.detach()

    def backbones() -> None:
        with policy.autocast():
            models = (policy.actor.get_decoder(), policy.critic.backbone)
            states = [m(**inputs).last_hidden_state for m in models]
        torch.autograd.backward(states, states)

    return Parts(plain_advantages(task), gradients, backbones)


def show(provider: str, step_ms: float, parts_ms: dict[str, float]) -> None:
    print(f"\n{provider}: {step_ms:.4g} ms a step")
    whole = sum(parts_ms.values())
    for name, ms in parts_ms.items():
        gain = f"at most {whole / (whole - ms):.2f} times as fast without it" if ms < whole else ""
        print(f"    {name:24}{ms:10.4g} ms {100 * ms / whole:5.1f} %   {gain}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[kind, metafunc.config.getoption("--size")]
    names = [f"layers{layers}-D{width}-V{V}" for layers, width, _, _, _, V, *_ in shapes]
    metafunc.parametrize("shape", shapes, ids=names)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_learn(
    compare: Callable[..., None],
    row: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
    backend: str,
    provider: str,
    shape: tuple[int, ...],
) -> None:
    free = free_bytes(device)
    reason = None if free is None else why_not(shape, provider, free)
    if reason is not None:
        row.extra_info.update(operation=OPERATION, provider=provider, shape=str(shape), skipped=reason)
        pytest.skip(reason)
    try:
        measure_step(compare, row.extra_info, capsys, device, backend, provider, shape, free)
    except torch.OutOfMemoryError as error:
        row.extra_info.update(operation=OPERATION, provider=provider, out_of_memory=str(error).splitlines()[0])
        pytest.skip(f"{provider} runs out of memory at {shape}")


def measure_step(
    compare: Callable[..., None],
    info: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
    backend: str,
    provider: str,
    shape: tuple[int, ...],
    free: int | None,
) -> None:
    """Measure one row: the step, then each of its parts alone."""
    task = make(shape, device, backend)
    from ppo_fast.llm.optimizer import Optimizer

    rollout, options = task.rollout, task.options
    parts = eager(task) if provider == EAGER else ours(task, PROVIDERS[provider])
    optimizers = [Optimizer(m, 1e-6, options) for m in (task.policy.actor, task.policy.critic)]

    def optimise() -> None:
        for optimizer in optimizers:
            optimizer.clip()
            optimizer.adamw.step()

    def zero_grad() -> None:
        for optimizer in optimizers:
            optimizer.adamw.zero_grad()

    def run() -> Tensor:
        loss = parts.gradients(parts.advantages())
        optimise()
        zero_grad()
        return loss

    truth = loss_of_eager(task, shape, free, info)
    zero_grad()
    lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.completion_lengths, strict=True)]
    layers, width, _, _, inner, V, sequences, *_ = shape
    compare(
        run,
        operation=OPERATION,
        provider=provider,
        shape=f"layers={layers} D={width} V={V} sequences={sequences} tokens={sum(lengths)}",
        dtype=options.dtype,
        bytes=28 * sum(p.numel() for p in task.policy.parameters()),  # weight, gradient, AdamW's two, in and out
        flops=flops_of(shape, rollout),
        gemm=(sum(lengths), inner, width),
        results=lambda: [parts.gradients(parts.advantages())],
        truth=truth,
    )
    step_ms = statistics.median(info["samples_ms"])
    info["answer_tokens"] = sum(rollout.completion_lengths)
    info["tokens_per_s"] = 1e3 * sum(lengths) / step_ms

    def alone(call: Callable[[], Any]) -> float:
        return statistics.median(measure.samples_ms(call, device, seconds=min(1.0, 5 * step_ms / 1e3)))

    def gradients() -> None:
        parts.gradients(task.experience)
        zero_grad()

    def backbones() -> None:
        parts.backbones()
        zero_grad()

    without_head = alone(backbones)
    info["parts_ms"] = {"advantages": alone(parts.advantages), "backbones": without_head}
    info["parts_ms"]["head and loss"] = alone(gradients) - without_head
    parts.gradients(task.experience)
    info["parts_ms"]["clipping and AdamW"] = alone(optimise)
    with capsys.disabled():
        show(provider, step_ms, info["parts_ms"])
