"""What the Triton launchers share: no Triton code, and nothing that needs Triton to import."""

import os
from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """One way in which a launcher may start a kernel; the ahead-of-time gate compiles every one of them."""

    name: str
    kernel: Any  # the triton.JITFunction
    types: dict[str, str]  # argument -> "*bf16", "fp32", "i64", in the kernel's order, constexprs left out
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()  # arguments that Triton may specialise on divisibility by 16
    registers: int | None = None  # what `at_most` was given, if anything


REGISTERS = 255  # all that a thread of an NVIDIA GPU can have


def at_most(registers: int) -> dict[str, int]:
    """Options of a launch that may use so many registers, where a GPU has such a limit (AMD's takes none).

    Left to itself ptxas aims at one more block on a multiprocessor, and for some kernels spills a few bytes for it.
    """
    return {} if torch.version.hip else {"maxnreg": registers}


def interpreting() -> bool:
    """True where Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
