"""The device that options name."""

import torch

from ppo_fast.errors import UserError
from ppo_fast.ops import Backend, uses_triton


def pick_device(name: str, backend: Backend = "auto") -> torch.device:
    """The device `name`; "auto" is a GPU if there is one.

    Raises:
        UserError: there is no such device, or `backend` cannot compute there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name, no such GPU, a PyTorch without CUDA
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; use cpu") from error
    try:
        uses_triton(backend, probe)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    return probe.device
