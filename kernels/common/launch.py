"""What the Triton launchers share: no Triton code, and nothing that needs Triton to import."""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch

REGISTERS = 255  # the most that a thread of an NVIDIA GPU can have


class Variant(NamedTuple):
    """One compiled form of a kernel that a launcher may start.

    No launch specialises on the value or the alignment of an argument, so types, constexprs and options determine the
    compiled code. `python bench/static.py` compiles every variant, and a test compares the list with real launches.
    """

    name: str
    kernel: Any  # the triton.JITFunction
    types: dict[str, str]  # argument -> "*bf16", "fp32", "i64", in the kernel's order, without constexprs
    constexprs: dict[str, Any]
    options: dict[str, Any]  # from launch_options


@functools.cache
def launch_options(num_warps: int, registers: int | None = None) -> dict[str, Any]:
    """Compile options of a launch. Do not change the result: it is shared.

    enable_fp_fusion is off so that every compiler and GPU computes what the source says: a fused multiply-add appears
    where the source calls tl.fma and nowhere else. `registers` is an upper bound for a thread, which only NVIDIA GPUs
    have: without it ptxas aims at one more block on a multiprocessor and spills a few bytes in some kernels.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if registers is not None and not torch.version.hip:
        options["maxnreg"] = registers
    return options


_NOTHING = contextlib.nullcontext()


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of x current, which is where Triton launches. Costs microseconds only where it is another."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NOTHING


def interpreting() -> bool:
    """True where kernels run on CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
