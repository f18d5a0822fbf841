"""ppo-fast doctor: the backends of this machine, and a check of each operation on them.

Every public operation runs on every backend and in every dtype of this machine. Its outputs and gradients are compared
with `kernels/reference.py` in fp64. The error may be at most twice that of the reference in the same dtype, plus 1e-6
of the largest value, for rounding where the reference happens to be exact.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.common import device as devices
from ppo_fast.common.errors import UserError
from ppo_fast.common.threads import threads_note
from ppo_fast.kernels import reference
from ppo_fast.kernels.common.numba_loops import numba_works
from ppo_fast.kernels.linear.chunks import product_path
from ppo_fast.llm.packing import flash

_PRODUCTS = {  # of the linear operations, by product_path
    "exact": "unchanged",
    "widening": "into fp32",
    "converted": "after conversion to fp32",
    "mixed": "into fp32, by oneDNN's bf16 precision of fp32 products",
    "rounded": "into the same dtype, and then to fp32",
}

PACKAGES = ("ppo_fast", "torch", "triton", "numba", "transformers", "flash-attn", "flash_attn_3", "peft", "gymnasium")
SLACK = 1e-6
HEAD_SIZE = 128

Inputs = dict[str, Tensor]
Operations = ModuleType  # ppo_fast itself or the reference: both have the same functions


@runtime_checkable
class CachedLoop(Protocol):
    """A loop that numba has compiled, and its cache on disk."""

    cache_hits: int
    _cache: object


class Kernel(NamedTuple):
    """A compiled kernel: SHA-256 of its binary, which contains paths of source files, and of its PTX without paths."""

    name: str
    num_warps: int
    binary: str
    ptx: str


class Check(NamedTuple):
    """One operation in one dtype: its largest error against fp64 over all results, and the bound of the error."""

    operation: str
    device: str
    backend: str
    dtype: str
    error: float
    bound: float
    passed: bool
    note: str = ""


def make_inputs(device: torch.device, *, B: int = 5, T: int = 37, V: int = 1003, D: int = 48) -> Inputs:
    """Make random tensors of odd sizes in fp64, with a mask that has gaps and -inf in the logits."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device)

    def flags(share: float) -> Tensor:
        return (torch.rand(B, T, generator=generator, device="cpu") < share).to(device)

    logits = 3 * normal(B, T, V)
    logits[..., 7::100] = -torch.inf
    mask = flags(0.8)
    mask[1] = False
    tokens = torch.randint(0, V // 100 * 100, (B, T), generator=generator, device="cpu").to(device)
    tokens += tokens % 100 == 7
    ends = flags(0.1)
    logprobs = -normal(B, T).abs()
    return {
        "logits": logits,
        "tokens": tokens,
        "mask": mask,
        "ends": ends,
        "cuts": flags(0.1),
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
        "cu_seqlens": torch.tensor([0, B * T // 5, B * T // 5, B * T // 2, B * T], device=device),
    }


def _token_logprobs(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    return ops.token_logprobs(x["logits"], x["tokens"], x["mask"], temperature=0.7, with_entropy=True, **options)


def _policy_loss(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    loss, _ = ops.policy_loss(*(x[name] for name in names), clip_high=0.3, **options)
    return (loss,)


def _value_loss(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    loss, _ = ops.value_loss(*(x[name] for name in ("values", "old_values", "returns", "mask")), **options)
    return (loss,)


def _ppo_loss(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
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


def _gae(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    flags = {"mask": x["mask"], "terminated": x["ends"], "truncated": x["cuts"], "final_values": x["final_values"]}
    return ops.gae(x["rewards"], x["values"], gamma=0.99, lam=0.9, bootstrap=x["bootstrap"], **flags, **options)


def _gae_packed(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    flat = {name: x[name].flatten() for name in ("rewards", "values", "mask")}
    return ops.gae(**flat, gamma=0.99, lam=0.9, cu_seqlens=x["cu_seqlens"], **options)


def _gae_time_major(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    flipped = {"rewards": x["rewards"].T, "values": x["values"].T, "terminated": x["ends"].T}
    return ops.gae(**flipped, gamma=0.99, lam=0.9, bootstrap=x["bootstrap"], time_major=True, **options)


def _shape_rewards(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    return ops.shape_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], kl_estimator="k3", **options)


def _masked_whiten(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    return (ops.masked_whiten(x["advantages"], x["mask"], **options),)


def _rlhf_advantages(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    names = ("scores", "logprobs", "ref_logprobs", "values", "mask")
    return tuple(ops.rlhf_advantages(*(x[name] for name in names), **options))[:4]


def _linear_logprobs(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    names = ("hidden", "weight", "tokens", "mask")
    return ops.linear_logprobs(*(x[name] for name in names), temperature=0.7, with_entropy=True, **options)


def _linear_ppo_loss(ops: Operations, x: Inputs, **options: object) -> tuple[Tensor, ...]:
    names = ("hidden", "weight", "tokens", "old_logprobs", "advantages", "mask")
    loss, *_ = ops.linear_ppo_loss(*(x[name] for name in names), entropy_coef=0.01, softcap=5.0, **options)
    return (loss,)


CHECKS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]] = {
    # name: (the call, the inputs that need gradients)
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


def results(name: str, ops: Operations, inputs: Inputs, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """Compute the outputs of an operation and, by a random projection of them, its gradients."""
    run, differentiable = CHECKS[name]
    cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    leaves = [cast[key].requires_grad_() for key in differentiable]
    outputs = list(run(ops, cast, **options))
    if not leaves:
        return outputs
    generator = torch.Generator("cpu").manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y) for y in outputs]
    total = sum(
        ((w * y).sum() for w, y in zip(weights, outputs, strict=True)), start=torch.zeros_like(weights[0].sum())
    )
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, leaves))


def compare(actual: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> tuple[float, float, bool]:
    """Return error and bound of the result that is closest to its bound, and whether all results are within theirs."""
    worst, worst_bound, passed = 0.0, 0.0, True
    for a, e, t in zip(actual, eager, truth, strict=True):
        error = (a.double() - t).abs().max().item()
        bound = 2 * (e.double() - t).abs().max().item() + SLACK * max(1.0, t.abs().max().item())
        passed = passed and error <= bound  # a NaN never passes
        if error / bound >= worst / max(worst_bound, 1e-300) or error != error:
            worst, worst_bound = error, bound
    return worst, worst_bound, passed


def check(name: str, inputs: Inputs, dtype: torch.dtype, backend: str) -> Check:
    """Run one operation and compare it with the reference in fp64 on the same rounded inputs."""
    label, device = str(dtype).removeprefix("torch."), inputs["mask"].device.type
    rounded = {key: x.to(dtype).double() if x.is_floating_point() else x for key, x in inputs.items()}
    truth = results(name, reference, rounded, torch.float64)
    eager = results(name, reference, rounded, dtype)
    try:
        actual = results(name, ppo, rounded, dtype, backend=backend)
    except Exception as failure:  # an error of a compiler or driver fails this check only
        return Check(name, device, backend, label, float("inf"), 0.0, False, f"{type(failure).__name__}: {failure}")
    return Check(name, device, backend, label, *compare(actual, eager, truth))


def plan() -> list[tuple[str, str, torch.dtype]]:
    """List device, backend and dtype of all checks: every combination of this machine."""
    places = [("cpu", "torch")]
    if torch.cuda.is_available():
        places += [("cuda", "triton")] if find_spec("triton") else []
        places += [("cuda", "torch")]
    return [(*place, dtype) for place in places for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def examine() -> list[Check]:
    """Check every operation on every device and backend and in every dtype of this machine."""
    planned = plan()
    inputs = {device: make_inputs(torch.device(device)) for device, _, _ in planned}
    return [check(name, inputs[device], dtype, backend) for device, backend, dtype in planned for name in CHECKS]


def compiled_kernels() -> list[Kernel]:
    """List the kernels that this process has compiled for a GPU; none if Triton's interpreter runs them."""
    if not find_spec("triton"):
        return []
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("ppo_fast.kernels.")]
    functions = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    found = []
    for function in functions.values():
        for cache, *_ in function.device_caches.values():  # of each device: variants, then arguments of launches
            for kernel in cache.values():
                binary = kernel.asm.get("cubin") or kernel.asm.get("hsaco") or b""
                ptx = kernel.asm.get("ptx") or kernel.asm.get("amdgcn") or ""
                code = "\n".join(x for x in ptx.partition(".section")[0].splitlines() if not _names_a_file(x))
                hashes = (hashlib.sha256(x).hexdigest() for x in (binary, code.encode()))
                found.append(Kernel(kernel.metadata.name, kernel.metadata.num_warps, *hashes))
    return sorted(found)


def _names_a_file(line: str) -> bool:
    """Return True for the lines of an assembly that depend on the paths of the source files."""
    return line.lstrip().startswith((".file", ".loc", "//"))


def _driver() -> str:
    """Return the version of the driver of the GPU."""
    if not shutil.which("nvidia-smi"):
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    return found[0] if found else "unknown"


def _attention(device: torch.device) -> dict[str, str]:
    """Return the attention path of a run on packed rows, by compute dtype, for layers with heads of HEAD_SIZE."""
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)
    facts = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        request = flash.Request(device=device, dtype=dtype, head_size=HEAD_SIZE, value_size=HEAD_SIZE, grouped=True)
        decision = flash.decide(request)
        name = str(dtype).removeprefix("torch.")
        told = decision.unexpected or (dtype != torch.float32 and decision.path == flash.BUCKETS)
        facts[f"attention {name}"] = decision.label + (f" ({decision.reason})" if told else "")
    return facts


def describe() -> dict[str, str]:
    """Return the hardware and versions of this machine, and the backends that they allow."""
    facts = {"python": platform.python_version(), "machine": f"{platform.machine()}, {threads_note()}"}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        architecture = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        facts["architecture"] = f"{architecture}, compute capability {properties.major}.{properties.minor}"
        facts["driver"] = f"{_driver()}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        facts["operations"] = "Triton kernels for CUDA tensors" if find_spec("triton") else "PyTorch (no triton)"
    else:
        facts["gpu"] = "none"
        facts["operations"] = "PyTorch on the CPU; gae by " + ("numba" if numba_works() else "PyTorch (no numba)")
        facts["bfloat16"] = f"a small product takes {devices.bfloat16_cost():.2g} times as long as in float32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = {dtype: product_path(device, dtype) for dtype in (torch.bfloat16, torch.float16)}
    facts["products"] = ", ".join(f"{str(dtype)[6:]} {_PRODUCTS[path]}" for dtype, path in paths.items())
    facts.update(_attention(device))
    return facts


def _print_facts(facts: dict[str, str]) -> None:
    for name, fact in facts.items():
        print(f"{name:18} {fact}")


def _print_checks(checks: list[Check], seconds: float) -> None:
    print(f"\n{'operation':17} {'device':6} {'backend':8} {'dtype':9} {'error':>9} {'bound':>9}  verdict")
    for c in checks:
        verdict = "right" if c.passed else f"WRONG {c.note}"
        print(f"{c.operation:17} {c.device:6} {c.backend:8} {c.dtype:9} {c.error:9.1e} {c.bound:9.1e}  {verdict}")
    right = sum(c.passed for c in checks)
    print(f"\n{right} of {len(checks)} checks are right ({seconds:.1f} s)")


def _print_kernels(kernels: list[Kernel]) -> None:
    """Print the first 16 digits of each hash."""
    if not kernels:
        print("\nno GPU: no compiled kernels")
        return
    print(f"\n{'kernel':32} {'warps':>5} {'SHA-256 of binary':18} and of its PTX")
    for kernel in kernels:
        print(f"{kernel.name:32} {kernel.num_warps:5} {kernel.binary[:16]:18} {kernel.ptx[:16]}")


def compile_loops() -> None:
    """Compile the loops of numba, which are cached on disk, and print the folder.

    Raises:
        UserError: numba is not installed or does not work, or finds no folder for its cache.
    """
    if not numba_works():
        raise UserError('there is nothing to compile without numba: pip install "ppo_fast[cpu]"')
    from ppo_fast.kernels.advantages import cpu as cpu_advantages
    from ppo_fast.kernels.gae import cpu
    from ppo_fast.kernels.loss import cpu as cpu_loss

    loops: list[Callable[[], tuple[Callable[..., None], object]]] = [*cpu.ALL, *cpu_loss.ALL, *cpu_advantages.ALL]
    start, folders = time.perf_counter(), []
    for number, loop in enumerate(loops, 1):
        _, code = loop()
        if not isinstance(code, CachedLoop):
            raise TypeError(f"numba has compiled a loop to a {type(code).__name__}, which has no cache")
        print(f"loop {number} of {len(loops)}: {(code.cache_hits and 'cached') or 'compiled'}", flush=True)
        folder = getattr(code._cache, "cache_path", None)
        if folder is None:
            raise UserError("numba found no folder for its cache: set NUMBA_CACHE_DIR to a folder that can be written")
        folders.append(folder)
    print(f"{len(loops)} loops in {time.perf_counter() - start:.1f} s are below {os.path.commonpath(folders)}")


def main(*, as_json: bool, report: bool = False) -> int:
    """Print facts and checks, as JSON or as a report for an issue, with the compiled kernels.

    Returns:
        The exit status: 1 if a check fails.
    """
    start = time.perf_counter()
    facts, checks = describe(), examine()
    seconds = time.perf_counter() - start
    kernels = compiled_kernels()
    passed = all(c.passed for c in checks)
    if as_json:
        record = {
            "machine": facts,
            "checks": [c._asdict() for c in checks],
            "kernels": [x._asdict() for x in kernels],
            "seconds": seconds,
            "passed": passed,
        }
        json.dump(record, sys.stdout, indent=2)
        print()
        return 0 if passed else 1
    if report:
        print("```")
    _print_facts(facts)
    _print_checks(checks, seconds)
    if report:
        _print_kernels(kernels)
        print("```")
    return 0 if passed else 1
