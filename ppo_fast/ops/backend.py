"""The choice between the Triton kernels and PyTorch."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ppo_fast.kernels.common import memory
from ppo_fast.ops import checks

Backend = Literal["auto", "triton", "torch"]


_HAS_TRITON = find_spec("triton") is not None


def uses_triton(backend: Backend, first: Tensor, *others: Tensor | None) -> bool:
    """True if `backend` means the Triton kernels for these tensors; raises an error where it cannot."""
    if backend == "torch" or (backend == "auto" and not (first.is_cuda and _HAS_TRITON)):
        return False
    checks.one_of("backend", backend, ("auto", "triton", "torch"))
    double = first.dtype is torch.float64
    for x in others:
        double = double or (x is not None and x.dtype is torch.float64)
    traced = memory.traced(first, *others)
    if backend == "auto":
        return not double and not traced
    if not _HAS_TRITON:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed; use backend='torch'")
    if double:
        raise TypeError("backend='triton' computes in fp32 and takes no fp64 tensors; use backend='torch'")
    if traced:
        raise RuntimeError(
            "backend='triton' cannot run under make_fx or FakeTensorMode, which do not record the launch of a kernel;"
            " use backend='torch', or torch.compile"
        )
    if not first.is_cuda:
        from ppo_fast.kernels.common import launch

        if not launch.interpreting():
            raise RuntimeError(
                f"backend='triton' needs CUDA tensors, got {first.device}; use backend='torch', or set"
                " TRITON_INTERPRET=1 before the first import to run the kernels slowly on a CPU"
            )
    return True
