"""The device that options name, and what it can do.

Only this module asks PyTorch about a type of device; everything else asks it with the device of a tensor or of the run,
never about the current device. A run on the CPU calls nothing of CUDA, and so opens no context on a GPU.
"""

from typing import Any

import torch

from ppo_fast.errors import UserError
from ppo_fast.ops import Backend, uses_triton


def pick_device(name: str, backend: Backend = "auto", dtype: str = "float32") -> torch.device:
    """The device `name`, with its index; "auto" is a GPU if there is one.

    Raises:
        UserError: the device does not exist, `backend` cannot compute on it, or it has no bfloat16 and `dtype` is that.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be cpu, cuda, cuda:1, ... or auto, got {name!r}") from error
    _check_exists(device)
    probe = torch.zeros((), device=device)
    try:
        uses_triton(backend, probe)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    if dtype == "bfloat16" and not has_bfloat16(probe.device):
        major, minor = compute_capability(probe.device) or (0, 0)
        raise UserError(
            f"dtype = bfloat16 needs a GPU of compute capability 8.0 or newer, and {probe.device} has {major}.{minor};"
            " use --dtype float32"
        )
    return probe.device


def _check_exists(device: torch.device) -> None:
    """Raises UserError with what this machine has instead."""
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "finds no GPU or no driver" if built else "is built for the CPU only"
        raise UserError(f"device {str(device)!r} cannot be used: PyTorch {torch.__version__} {reason}; use --device cpu")
    try:
        count = device_module(device).device_count()
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"device {str(device)!r} cannot be used: PyTorch {torch.__version__} does not support it") from error
    if device.type != "cpu" and (device.index or 0) >= count:
        names = ", ".join(f"{device.type}:{i}" for i in range(count)) or "none"
        raise UserError(f"device {str(device)!r} does not exist; this machine has {names}")


def device_module(device: torch.device) -> Any:
    """torch.cuda, torch.cpu, ...: the module with the functions of the device's type."""
    return torch.get_device_module(device)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; on a CPU always true, since PyTorch emulates it there."""
    capability = compute_capability(device)
    return capability is None or capability >= (8, 0)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was launched."""
    if device.type != "cpu":
        device_module(device).synchronize(device)
