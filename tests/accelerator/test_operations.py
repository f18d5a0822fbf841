"""Every public operation with backend="torch" on the second test device: values and gradients are those of the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator.runs import untouched
from accelerator.waits import record_waits
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels.linear import chunks as linear_chunks

B, T, V, D = 5, 13, 97, 16
Inputs = dict[str, Tensor]
PLAIN: dict[str, Any] = {"backend": "torch"}
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def inputs(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same numbers on each device; logits, hidden states and weights in `dtype`."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0] = True
    found = {
        "logits": normal(B, T, V).to(dtype),
        "hidden": normal(B, T, D).to(dtype),
        "weight": (normal(V, D) * 0.3).to(dtype),
        "bias": normal(V).to(dtype),
        "tokens": torch.randint(0, V, (B, T), generator=g),
        "mask": mask,
        "terminated": torch.rand(B, T, generator=g) < 0.1,
        "truncated": torch.rand(B, T, generator=g) < 0.1,
        "cu_seqlens": torch.tensor([0, 9, 9, 30, B * T]),
        "scores": normal(B),
        "bootstrap": normal(B),
    }
    found |= {name: -normal(B, T).abs() for name in ("logprobs", "old_logprobs", "ref_logprobs")}
    found |= {name: normal(B, T).abs() for name in ("entropy", "weights")}
    names = ("values", "old_values", "advantages", "returns", "rewards", "final_values")
    found |= {name: normal(B, T) for name in names}
    return {name: x.to(device) for name, x in found.items()}


def leaves(x: Inputs, *names: str) -> list[Tensor]:
    return [x[name].detach().clone().requires_grad_() for name in names]


def packed(x: Inputs) -> Inputs:
    return {name: v.flatten(0, 1) if v.shape[:2] == (B, T) else v for name, v in x.items()}


def token_logprobs(x: Inputs, **options: Any) -> list[Tensor]:
    (logits,) = leaves(x, "logits")
    logprobs, entropy = ppo.token_logprobs(
        logits, x["tokens"], x["mask"], temperature=0.7, with_entropy=True, **options, **PLAIN
    )
    (logprobs.sum() + entropy.square().sum()).backward()
    return [logprobs, entropy, logits.grad]


def linear_logprobs(x: Inputs, **options: Any) -> list[Tensor]:
    hidden, weight, bias = leaves(x, "hidden", "weight", "bias")
    logprobs, entropy = ppo.linear_logprobs(
        hidden, weight, x["tokens"], x["mask"], bias=bias, with_entropy=True, **options, **PLAIN
    )
    (logprobs.sum() + entropy.square().sum()).backward()
    return [logprobs, entropy, hidden.grad, weight.grad, bias.grad]


def linear_logprobs_without_gradients(x: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [ppo.linear_logprobs(x["hidden"], x["weight"], x["tokens"], x["mask"], **PLAIN)]


def linear_ppo_loss(x: Inputs, aggregation: str = "token-mean", **options: Any) -> list[Tensor]:
    hidden, weight, bias = leaves(x, "hidden", "weight", "bias")
    terms = dict(ref_logprobs=x["ref_logprobs"], kl_coef=0.1, entropy_coef=0.01, weights=x["weights"], dual_clip=3.0)
    arguments = (x["tokens"], x["old_logprobs"], x["advantages"], x["mask"])
    out = ppo.linear_ppo_loss(
        hidden, weight, *arguments, bias=bias, aggregation=aggregation, **terms, **options, **PLAIN
    )
    out.loss.backward()
    return [out.loss, hidden.grad, weight.grad, bias.grad, *out.stats.values(), out.logprobs, out.entropy]


def ppo_loss(x: Inputs, aggregation: str = "token-mean", **options: Any) -> list[Tensor]:
    logprobs, values, entropy = leaves(x, "logprobs", "values", "entropy")
    arguments = (x["old_logprobs"], x["old_values"], x["advantages"], x["returns"], x["mask"])
    out = ppo.ppo_loss(
        logprobs, values, *arguments, entropy=entropy, entropy_coef=0.01, aggregation=aggregation, **options, **PLAIN
    )
    out.loss.backward()
    return [out.loss, logprobs.grad, values.grad, entropy.grad, *out.stats.values()]


def separate_losses(x: Inputs) -> list[Tensor]:
    logprobs, values = leaves(x, "logprobs", "values")
    policy = ppo.policy_loss(logprobs, x["old_logprobs"], x["advantages"], x["mask"], **PLAIN)
    value = ppo.value_loss(values, None, x["returns"], x["mask"], clip=None, **PLAIN)
    (policy.loss + value.loss).backward()
    return [policy.loss, value.loss, logprobs.grad, values.grad]


def gae(x: Inputs, **options: Any) -> list[Tensor]:
    return list(ppo.gae(x["rewards"], x["values"], **{"gamma": 0.99, "lam": 0.95, **options}, **PLAIN))


def gae_with_episodes(x: Inputs) -> list[Tensor]:
    ends = {name: x[name] for name in ("mask", "terminated", "truncated", "bootstrap", "final_values")}
    return gae(x, **ends)


def gae_with_tensors(x: Inputs) -> list[Tensor]:
    device = x["values"].device
    return gae(x, gamma=torch.full((B,), 0.9, device=device), lam=torch.full((), 0.9, device=device), mask=x["mask"])


def gae_time_major(x: Inputs) -> list[Tensor]:
    turned = {**x, "rewards": x["rewards"].T, "values": x["values"].T}
    return gae(turned, mask=x["mask"].T, bootstrap=x["bootstrap"], time_major=True)


def shape_rewards(x: Inputs, scores: str = "scores", **options: Any) -> list[Tensor]:
    arguments = (x[scores], x["old_logprobs"], x["ref_logprobs"], x["mask"])
    found = ppo.shape_rewards(*arguments, kl_coef=0.05, **options, **PLAIN)
    return list(found) if isinstance(found, tuple) else [found]


def rlhf_advantages(x: Inputs, **options: Any) -> list[Tensor]:
    arguments = (x["scores"], x["old_logprobs"], x["ref_logprobs"], x["values"], x["mask"])
    out = ppo.rlhf_advantages(*arguments, kl_coef=0.05, bootstrap=x["bootstrap"], **options, **PLAIN)
    return [*out[:4], *out.stats.values()]


OPERATIONS: dict[str, Callable[[Inputs], list[Tensor]]] = {
    "token_logprobs": token_logprobs,
    "token_logprobs, in place": lambda x: token_logprobs(x, inplace_backward=True),
    "linear_logprobs": lambda x: linear_logprobs(x, softcap=5.0),
    "linear_logprobs without gradients": linear_logprobs_without_gradients,
    **{f"linear_ppo_loss, {a}": lambda x, a=a: linear_ppo_loss(x, a) for a in AGGREGATIONS},
    "linear_ppo_loss, norm": lambda x: linear_ppo_loss(x, "seq-mean-token-sum-norm", norm_length=9.0),
    "linear_ppo_loss, denominator": lambda x: linear_ppo_loss(x, denominator=x["mask"].sum().float()),
    "linear_ppo_loss, denominator on the cpu": lambda x: linear_ppo_loss(x, denominator=torch.tensor(50.0)),
    "linear_ppo_loss, packed": lambda x: linear_ppo_loss(packed(x), AGGREGATIONS[2], cu_seqlens=x["cu_seqlens"]),
    **{f"ppo_loss, {a}": lambda x, a=a: ppo_loss(x, a) for a in AGGREGATIONS},
    "ppo_loss, denominator": lambda x: ppo_loss(x, denominator=x["mask"].sum().float()),
    "ppo_loss, packed": lambda x: ppo_loss(packed(x), AGGREGATIONS[3], cu_seqlens=x["cu_seqlens"]),
    "policy_loss and value_loss": separate_losses,
    "gae": gae,
    "gae, episodes": gae_with_episodes,
    "gae, tensors": gae_with_tensors,
    "gae, time-major": gae_time_major,
    "gae, packed": lambda x: gae(packed(x), cu_seqlens=x["cu_seqlens"]),
    "shape_rewards": shape_rewards,
    "shape_rewards, each token": lambda x: shape_rewards(x, "rewards", kl_estimator="k3", score_clip=1.0),
    "masked_whiten": lambda x: [ppo.masked_whiten(x["advantages"], x["mask"], **PLAIN)],
    "masked_whiten, min_std": lambda x: [
        ppo.masked_whiten(x["advantages"], x["mask"], min_std=x["mask"].sum().float(), **PLAIN)
    ],
    "masked_whiten, min_std on the cpu": lambda x: [
        ppo.masked_whiten(x["advantages"], x["mask"], min_std=torch.tensor(5.0), **PLAIN)
    ],
    "rlhf_advantages": rlhf_advantages,
    "rlhf_advantages, two lambdas": lambda x: rlhf_advantages(x, critic_lam=1.0),
    "rlhf_advantages, lambdas of each row": lambda x: rlhf_advantages(
        x, lam=x["bootstrap"].sigmoid(), critic_lam=x["scores"].sigmoid()
    ),
}
HALF = [name for name in OPERATIONS if "logprobs" in name or name.startswith("linear")]  # that take fp16 or bf16


def compare(found: list[Tensor], expected: list[Tensor], device: torch.device, rtol: float, atol: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.device == device
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_cpu(
    name: str, testgpu: torch.device, second_testgpu: torch.device
) -> None:
    expected = OPERATIONS[name](inputs("cpu"))
    x = inputs(second_testgpu)
    with untouched(testgpu):
        found = OPERATIONS[name](x)
    # The chunks of logits have other sizes than on a CPU: sums in another order, off by a few 2^-24.
    compare(found, expected, second_testgpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["widening", "rounded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", HALF)
def test_values_and_gradients_in_half_precision_are_those_of_the_cpu(
    name: str,
    dtype: torch.dtype,
    path: str,
    testgpu: torch.device,
    second_testgpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An NVIDIA GPU multiplies fp16 and bf16 into fp32 ("widening"); others round the product to their dtype."""
    expected = OPERATIONS[name](inputs("cpu", dtype))
    monkeypatch.setattr(linear_chunks, "product_path", lambda device, dtype: path)
    x = inputs(second_testgpu, dtype)
    with untouched(testgpu):
        found = OPERATIONS[name](x)
    unit = torch.finfo(dtype).eps
    # Gradients are rounded to their dtype, and dlogits to the operands' dtype before their product: some units of the
    # largest term. Rounded products also have logits that are off by a unit.
    compare(found, expected, second_testgpu, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_the_number_of_counted_tokens_makes_the_host_wait(name: str, testgpu: torch.device) -> None:
    x = inputs(testgpu)
    with record_waits() as waits:
        OPERATIONS[name](x)
    if name.startswith("linear"):
        assert [wait.operation for wait in waits] == ["aten::nonzero"], str(waits)
    else:
        assert not waits, str(waits)


@pytest.mark.parametrize("operation", [linear_logprobs, linear_ppo_loss])
def test_nothing_makes_the_host_wait_when_the_number_of_counted_tokens_is_given(
    operation: Callable, testgpu: torch.device
) -> None:
    x = inputs(testgpu)
    counted = int(x["mask"].sum())
    with record_waits() as waits:
        found = operation(x, num_counted=counted)
    assert not waits, str(waits)
    for ours, theirs in zip(found, operation(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


ONE_ON_THE_CPU: dict[str, Callable[[Inputs, Inputs], object]] = {
    "tokens": lambda x, c: ppo.token_logprobs(x["logits"], c["tokens"], **PLAIN),
    "values": lambda x, c: ppo.gae(x["rewards"], c["values"], gamma=1.0, lam=1.0, **PLAIN),
    "weight": lambda x, c: ppo.linear_logprobs(x["hidden"], c["weight"], x["tokens"], **PLAIN),
    "bias": lambda x, c: ppo.linear_logprobs(x["hidden"], x["weight"], x["tokens"], bias=c["bias"], **PLAIN),
    "mask": lambda x, c: ppo_loss({**x, "mask": c["mask"]}),
    "mask of whiten": lambda x, c: ppo.masked_whiten(x["advantages"], c["mask"], **PLAIN),
    "scores": lambda x, c: shape_rewards({**x, "scores": c["scores"]}),
    "cu_seqlens": lambda x, c: gae(packed(x), cu_seqlens=c["cu_seqlens"]),
    "weights": lambda x, c: ppo.policy_loss(
        x["logprobs"], x["old_logprobs"], x["advantages"], weights=c["weights"], **PLAIN
    ),
    "bootstrap": lambda x, c: rlhf_advantages({**x, "bootstrap": c["bootstrap"]}),
}


@pytest.mark.parametrize("name", ONE_ON_THE_CPU)
@pytest.mark.parametrize("other", ["cpu", "testgpu:1"])
def test_a_tensor_on_another_device_is_rejected_with_its_name(name: str, other: str, testgpu: torch.device) -> None:
    with pytest.raises((ValueError, TypeError), match=name.split(" ")[0]):
        ONE_ON_THE_CPU[name](inputs(testgpu), inputs(other))


def test_every_public_operation_is_tested_here() -> None:
    tested = " ".join(OPERATIONS)
    operations = [name for name in ppo.__all__ if name.islower()]
    assert [name for name in operations if name not in tested] == []
