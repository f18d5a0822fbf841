"""The most important questions about a GPU, answered within about two minutes, a line of JSON for each.

    python bench/first_minutes.py RECORD.jsonl [--commit HASH] [--tiny]

In this order: facts of the machine and a check of every operation on it (`ppo-fast doctor`); two steps of the
trainer for {fp32, bf16} x {Llama, GPT-2}, with finite metrics and a first ratio of exactly 1; attention over packed
rows (FlashAttention where the GPU has it) against attention by its definition in fp64, forward and gradients; compiled
kernels against fp64 on a vocabulary of real size. The exit status is 1 if an answer is no.
"""

import argparse
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import json_lines
import torch
from support import tiny
from torch import Tensor, nn

from ppo_fast import doctor
from ppo_fast.common import device as devices
from ppo_fast.llm.packing import attention

LENGTHS = (7, 1, 30, 16, 129)
HEAD_SIZE, SCALE = 64, 0.2
HEADS = {"as many keys as queries": (4, 4), "grouped queries": (8, 2)}
# Errors in eps of the largest value: a wrong mask is off by thousands even in fp16. fp32 sums gradients over sequences.
MOST_UNITS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64}
SIZES = {False: {"B": 4, "T": 64, "V": 50257, "D": 512}, True: {"B": 2, "T": 5, "V": 130, "D": 16}}


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked(name: str, inputs: doctor.Inputs, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    found = doctor.check(name, inputs, dtype, backend)
    return {"passed": found.passed, "error_of_fp64": found.error, "bound": found.bound, "note": found.note}


def ask_doctor(writer: json_lines.Writer, *, small: bool) -> None:
    """The machine, and every operation on every backend and in every dtype."""
    writer.measure({"question": "what does this machine have?"}, lambda: {"machine": doctor.describe()})
    sizes = {"B": 2, "T": 5, "V": 130, "D": 16} if small else {}
    for place, backend, dtype in doctor.plan():
        if small and dtype != torch.float32:
            continue
        inputs = doctor.make_inputs(torch.device(place), **sizes)
        for name in doctor.CHECKS:
            about = {"question": "is the operation right?", "operation": name, "device": place, "backend": backend}
            writer.measure(
                {**about, "dtype": label(dtype)},
                lambda name=name, inputs=inputs, dtype=dtype, backend=backend: checked(name, inputs, dtype, backend),
            )


def two_steps(family: str, dtype: str, device: torch.device) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = tiny.tiny_trainer(family, dtype, device).train()
    wrong = tiny.problems(history)
    times = [{name: x for name, x in row.items() if name.startswith("seconds/")} for row in history]
    messages = sorted({str(warning.message) for warning in said})
    return {"passed": not wrong, "problems": wrong, "warnings": messages, "steps": times}


def ask_trainer(writer: json_lines.Writer, device: torch.device) -> None:
    for dtype in tiny.DTYPES:
        for family in tiny.FAMILIES:
            about = {"question": "do two steps of the trainer work?", "family": family, "dtype": dtype}
            writer.measure(about, lambda f=family, d=dtype: two_steps(f, d, device))


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[total, H, d]: causal attention of each sequence to itself; q, k, v [1, heads, total, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    attended = []
    for q_, k_, v_ in zip(*(x.squeeze(0).split(LENGTHS, dim=1) for x in (q, k, v)), strict=True):
        scores = q_ @ k_.mT * SCALE
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        attended.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_)
    return torch.cat(attended, 1).transpose(0, 1)


def packed(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The attention path that the trainer chooses."""
    layout = attention.Layout.from_lengths(list(LENGTHS), q.device)
    options = {"scaling": SCALE, "sliding_window": window, **layout.arguments()}
    return attention.packed_attention_forward(nn.Module(), q, k, v, None, **options)[0].squeeze(0)


def by_library(
    function: Callable[..., Any], names: dict[str, str], q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> Tensor:
    """A variable-length function called directly, without code of this project; `names` are those of its options."""
    if "same heads" in names:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = [x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v)]
    ends = torch.tensor([0, *LENGTHS], device=q.device).cumsum(0).to(torch.int32)
    options: dict[str, Any] = {names["window"]: (-1 if window is None else window - 1, 0), names["scale"]: SCALE}
    options |= {names["causal"]: True} if "causal" in names else {}
    options |= {names["grouped"]: True} if "grouped" in names and q.shape[1] != k.shape[1] else {}
    return function(*rows, ends, ends, max(LENGTHS), max(LENGTHS), **options)


def kernels_of(run: Callable[[], Any]) -> list[str]:
    """Names of the attention kernels that a call launches, which show the path."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = {str(event.name()) for event in profile.profiler.kineto_results.events() if hasattr(event, "name")}
    wanted = ("flash", "fmha", "attention", "attn", "cudnn", "softmax")
    return sorted(name[:120] for name in names if any(word in name.lower() for word in wanted))


def compare_attention(
    function: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    window: int | None,
) -> dict[str, Any]:
    """Errors of output and gradients of q, k and v, as eps of the largest value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(LENGTHS), HEAD_SIZE) for n in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = function(*inputs, window), by_definition(*wide, window)
    upstream = torch.randn(exact.shape, generator=generator).to(device, dtype)
    actual = [out, *torch.autograd.grad(out, inputs, upstream)]
    truth = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    eps = torch.finfo(dtype).eps
    units = [((a.double() - t).abs().max() / (eps * t.abs().max())).item() for a, t in zip(actual, truth, strict=True)]
    kernels = kernels_of(lambda: function(*(x.detach() for x in inputs), window))
    return {
        "passed": max(units) <= MOST_UNITS[dtype],
        "eps_out_q_k_v": [round(x, 3) for x in units],
        "kernels": kernels,
    }


def libraries() -> dict[str, Callable[..., Tensor] | str]:
    """Variable-length functions by name, or the reason why there is none."""
    found: dict[str, Callable[..., Tensor] | str] = {"the trainer's path": packed}
    for name, module, function, names in (
        (
            "PyTorch's varlen_attn",
            "torch.nn.attention.varlen",
            "varlen_attn",
            {"window": "window_size", "scale": "scale"},
        ),
        (
            "flash_attn_varlen_func",
            "flash_attn",
            "flash_attn_varlen_func",
            {"window": "window_size", "scale": "softmax_scale", "causal": "causal"},
        ),
    ):
        try:
            call = getattr(importlib.import_module(module), function)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one built for another PyTorch
            found[name] = str(error).splitlines()[0]
            continue
        if "enable_gqa" in inspect.signature(call).parameters:
            names = {**names, "grouped": "enable_gqa"}
        elif function == "varlen_attn":  # of PyTorch 2.11
            names = {**names, "same heads": ""}
        found[name] = functools.partial(by_library, call, names)
    return found


def ask_attention(writer: json_lines.Writer, device: torch.device) -> None:
    old = (devices.compute_capability(device) or (0, 0)) < (8, 0)
    for name, function in libraries().items():
        about = {"question": "is packed attention exact?", "function": name}
        if old and function is not packed:
            function = f"{name} needs compute capability 8.0"
        if isinstance(function, str):
            writer.measure(about, lambda reason=function: {"skipped": reason})
            continue
        dtypes = (torch.bfloat16, torch.float16, *([torch.float32] if function is packed else []))
        for dtype in dtypes:
            for kind, heads in HEADS.items():
                for window in (None, 5):
                    row = {**about, "dtype": label(dtype), "heads": kind, "window": window}
                    writer.measure(
                        row,
                        lambda f=function, d=dtype, h=heads, w=window: compare_attention(f, device, d, h, w),
                    )


def ask_kernels(writer: json_lines.Writer, device: torch.device, *, small: bool) -> None:
    """Doctor's checks on larger tensors."""
    inputs = doctor.make_inputs(device, **SIZES[small])
    for dtype in (torch.float32, *([] if small else [torch.bfloat16])):
        for name in doctor.CHECKS:
            about = {"question": "is the kernel right at a real size?", "operation": name, "dtype": label(dtype)}
            writer.measure({**about, **SIZES[small]}, lambda n=name, d=dtype: checked(n, inputs, d, "triton"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file for the answers, one line of JSON each")
    parser.add_argument("--commit", default="unknown", help="commit to record")
    parser.add_argument("--tiny", action="store_true", help="small tensors and one dtype, for a dry run")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU on this machine")
    device = torch.device("cuda")
    writer = json_lines.Writer(options.record, options.commit)
    ask_doctor(writer, small=options.tiny)
    ask_trainer(writer, device)
    ask_attention(writer, device)
    ask_kernels(writer, device, small=options.tiny)
    print(f"{writer.failed} answers are no" if writer.failed else "every answer is yes")
    print(f"the record is {options.record}")
    return 1 if writer.failed else 0


if __name__ == "__main__":
    sys.exit(main())
