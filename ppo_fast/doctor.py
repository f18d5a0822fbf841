"""ppo-fast doctor: what this machine will run, and whether each operation is right on it.

Every operation runs on this very machine and is compared, forward and gradients, with `kernels/reference.py` in fp64.
Its error may be at most twice that of the reference in the same dtype, plus 1e-6 of the largest value for rounding
where the reference happens to be exact.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference

PACKAGES = ("torch", "triton", "numba", "transformers", "flash-attn", "peft", "gymnasium")
SLACK = 1e-6

Inputs = dict[str, Tensor]
Operations = Any  # ppo_fast itself or the reference: both have the same functions


class Check(NamedTuple):
    """One operation in one dtype: its largest error against fp64 over all results, and the bound for it."""

    operation: str
    backend: str
    dtype: str
    error: float
    bound: float
    passed: bool
    note: str = ""


def make_inputs(device: torch.device) -> Inputs:
    """Random tensors of awkward sizes in fp64, with a mask that has gaps and -inf in the logits."""
    generator = torch.Generator().manual_seed(0)
    B, T, V, D = 5, 37, 1003, 48

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    logits = 3 * normal(B, T, V)
    logits[..., 7::100] = -torch.inf
    mask = (torch.rand(B, T, generator=generator) < 0.8).to(device)
    mask[1] = False
    tokens = torch.randint(0, V // 100 * 100, (B, T), generator=generator).to(device)
    tokens += tokens % 100 == 7
    ends = (torch.rand(B, T, generator=generator) < 0.1).to(device)
    logprobs = -normal(B, T).abs()
    return {
        "logits": logits,
        "tokens": tokens,
        "mask": mask,
        "ends": ends,
        "cuts": (torch.rand(B, T, generator=generator) < 0.1).to(device),
        "hidden": normal(B, T, D),
        "weight": normal(V, D) / D**0.5,
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.3 * normal(B, T),
        "ref_logprobs": logprobs + 0.3 * normal(B, T),
        "entropy": normal(B, T).abs(),
        "values": normal(B, T),
        "old_values": normal(B, T),
        "advantages": normal(B, T),
        "returns": normal(B, T),
        "rewards": normal(B, T),
        "scores": normal(B),
        "bootstrap": normal(B),
        "final_values": normal(B, T),
        "cu_seqlens": torch.tensor([0, 40, 40, 100, B * T], device=device),
    }


def _token_logprobs(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    return ops.token_logprobs(x["logits"], x["tokens"], x["mask"], temperature=0.7, with_entropy=True, **options)


def _policy_loss(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    loss, _ = ops.policy_loss(*(x[name] for name in names), clip_high=0.3, **options)
    return (loss,)


def _value_loss(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    loss, _ = ops.value_loss(*(x[name] for name in ("values", "old_values", "returns", "mask")), **options)
    return (loss,)


def _ppo_loss(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    names = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns", "mask")
    loss, _ = ops.ppo_loss(
        *(x[name] for name in names),
        dual_clip=3.0,
        entropy=x["entropy"],
        entropy_coef=0.01,
        ref_logprobs=x["ref_logprobs"],
        kl_coef=0.1,
        aggregation="seq-mean-token-mean",
        **options,
    )
    return (loss,)


def _gae(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    flags = {"mask": x["mask"], "terminated": x["ends"], "truncated": x["cuts"], "final_values": x["final_values"]}
    return ops.gae(x["rewards"], x["values"], gamma=0.99, lam=0.9, bootstrap=x["bootstrap"], **flags, **options)


def _gae_packed(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    flat = {name: x[name].flatten() for name in ("rewards", "values", "mask")}
    return ops.gae(**flat, gamma=0.99, lam=0.9, cu_seqlens=x["cu_seqlens"], **options)


def _gae_time_major(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    flipped = {"rewards": x["rewards"].T, "values": x["values"].T, "terminated": x["ends"].T}
    return ops.gae(**flipped, gamma=0.99, lam=0.9, bootstrap=x["bootstrap"], time_major=True, **options)


def _shape_rewards(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    return ops.shape_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], kl_estimator="k3", **options)


def _masked_whiten(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    return (ops.masked_whiten(x["advantages"], x["mask"], **options),)


def _rlhf_advantages(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    names = ("scores", "logprobs", "ref_logprobs", "values", "mask")
    return tuple(ops.rlhf_advantages(*(x[name] for name in names), **options))[:4]


def _linear_logprobs(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    names = ("hidden", "weight", "tokens", "mask")
    return ops.linear_logprobs(*(x[name] for name in names), temperature=0.7, with_entropy=True, **options)


def _linear_ppo_loss(ops: Operations, x: Inputs, **options: Any) -> tuple[Tensor, ...]:
    names = ("hidden", "weight", "tokens", "old_logprobs", "advantages", "mask")
    loss, *_ = ops.linear_ppo_loss(*(x[name] for name in names), entropy_coef=0.01, softcap=5.0, **options)
    return (loss,)


CHECKS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    # name: (what to run, the inputs that want gradients)
    "token_logprobs": (_token_logprobs, ("logits",)),
    "policy_loss": (_policy_loss, ("logprobs",)),
    "value_loss": (_value_loss, ("values",)),
    "ppo_loss": (_ppo_loss, ("logprobs", "values", "entropy")),
    "gae": (_gae, ()),
    "gae, packed": (_gae_packed, ()),
    "gae, time-major": (_gae_time_major, ()),
    "shape_rewards": (_shape_rewards, ()),
    "masked_whiten": (_masked_whiten, ()),
    "rlhf_advantages": (_rlhf_advantages, ()),
    "linear_logprobs": (_linear_logprobs, ("hidden", "weight")),
    "linear_ppo_loss": (_linear_ppo_loss, ("hidden", "weight")),
}
NO_KERNEL = ("shape_rewards", "masked_whiten", "rlhf_advantages")  # PyTorch on every device


def results(name: str, ops: Operations, inputs: Inputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """An operation's outputs and, by a random projection of them, its gradients."""
    run, differentiable = CHECKS[name]
    cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    leaves = [cast[key].requires_grad_() for key in differentiable]
    outputs = list(run(ops, cast, **options))
    if not leaves:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    total = sum(
        ((w * y).sum() for w, y in zip(weights, outputs, strict=True)), start=torch.zeros_like(weights[0].sum())
    )
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, leaves))


def check(name: str, inputs: Inputs, dtype: torch.dtype, backend: str) -> Check:
    """Runs one operation and compares it with the reference in fp64 on the same rounded inputs."""
    label = str(dtype).removeprefix("torch.")
    rounded = {key: x.to(dtype).double() if x.is_floating_point() else x for key, x in inputs.items()}
    truth = results(name, reference, rounded, torch.float64)
    eager = results(name, reference, rounded, dtype)
    try:
        actual = results(name, ppo, rounded, dtype, backend=backend)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, ImportError) as failure:
        return Check(name, backend, label, float("inf"), 0.0, False, f"{type(failure).__name__}: {failure}")
    worst, worst_bound, passed = 0.0, 0.0, True
    for a, e, t in zip(actual, eager, truth, strict=True):
        error = (a.double() - t).abs().max().item()
        bound = 2 * (e.double() - t).abs().max().item() + SLACK * max(1.0, t.abs().max().item())
        passed = passed and error <= bound  # a NaN never passes
        if error / bound >= worst / max(worst_bound, 1e-300) or error != error:
            worst, worst_bound = error, bound
    return Check(name, backend, label, worst, worst_bound, passed)


def examine() -> list[Check]:
    """Every operation in every dtype and backend that this machine has."""
    cpu = make_inputs(torch.device("cpu"))
    plan = [(cpu, torch.float32, "torch")]
    if torch.cuda.is_available():
        gpu = make_inputs(torch.device("cuda"))
        plan += [(gpu, dtype, "triton") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        plan += [(gpu, torch.float32, "torch")]
    return [
        check(name, inputs, dtype, backend)
        for inputs, dtype, backend in plan
        for name in CHECKS
        if not (backend == "triton" and name in NO_KERNEL)
    ]


def describe() -> dict[str, str]:
    """What this machine has, and what will run on it."""
    facts = {"python": platform.python_version(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, cc {properties.major}.{properties.minor}"
        )
        facts["operations"] = "Triton kernels for CUDA tensors" if find_spec("triton") else "PyTorch (no triton)"
    else:
        facts["gpu"] = "none"
        facts["operations"] = "PyTorch on the CPU; gae by " + ("numba" if find_spec("numba") else "PyTorch (no numba)")
    if find_spec("flash_attn"):
        facts["attention"] = "flash-attn, variable length"
    elif torch.cuda.is_available() and find_spec("torch.nn.attention.varlen"):
        facts["attention"] = "torch.nn.attention.varlen (fp16 and bf16)"
    else:
        facts["attention"] = "PyTorch's scaled_dot_product_attention"
    return facts


def main(*, as_json: bool) -> int:
    """Prints facts and checks; 1 if a check fails."""
    start = time.perf_counter()
    facts, checks = describe(), examine()
    seconds = time.perf_counter() - start
    failed = [c for c in checks if not c.passed]
    if as_json:
        record = {"machine": facts, "checks": [c._asdict() for c in checks], "seconds": seconds, "passed": not failed}
        json.dump(record, sys.stdout, indent=2)
        print()
        return 1 if failed else 0
    for name, fact in facts.items():
        print(f"{name:14} {fact}")
    print(f"\n{'operation':17} {'backend':8} {'dtype':9} {'error':>9} {'bound':>9}  verdict")
    for c in checks:
        verdict = "right" if c.passed else f"WRONG {c.note}"
        print(f"{c.operation:17} {c.backend:8} {c.dtype:9} {c.error:9.1e} {c.bound:9.1e}  {verdict}")
    print(f"\n{len(checks) - len(failed)} of {len(checks)} checks are right ({seconds:.1f} s)")
    return 1 if failed else 0
