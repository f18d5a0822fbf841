"""Variants, compile options and device guards of all Triton launchers. Importing this needs no Triton."""

import contextlib
import functools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    import triton

REGISTERS = 255  # the most that a thread of an NVIDIA GPU can have


class Variant(NamedTuple):
    """One compiled form of a kernel that a launcher may start.

    No launch specialises on the value or the alignment of an argument, so types, constexprs and options determine the
    compiled code. `python bench/static.py` compiles every variant, and a test compares the list with real launches.
    """

    name: str
    kernel: "triton.JITFunction"
    types: dict[str, str]  # argument -> "*bf16", "fp32", "i64", in the kernel's order, without constexprs
    constexprs: dict[str, int]
    options: dict[str, int]  # from launch_options


@functools.cache
def launch_options(num_warps: int, max_registers: int | None = None) -> dict[str, int]:
    """Compile options of a launch. Do not change the result: it is shared.

    enable_fp_fusion is off so that every compiler and GPU computes what the source says: a fused multiply-add appears
    where the source calls tl.fma and nowhere else. `max_registers` is a bound per thread, which only NVIDIA GPUs have:
    without it ptxas tries to fit one more block on a multiprocessor and spills a few bytes in some kernels.
    """
    options: dict[str, int] = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if max_registers is not None and not torch.version.hip:
        options["maxnreg"] = max_registers
    return options


_NOTHING = contextlib.nullcontext()


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of x current, because Triton launches there. Takes time only if another one is current."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NOTHING


def interpreting() -> bool:
    """Return True where kernels run on CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
