"""The launches of a call: by PyTorch's profiler on a GPU, elsewhere by its operators and Triton's kernels."""

from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.kernels.common import launch

NOT_INTERPRETED = pytest.mark.skipif(
    launch.interpreting() and not torch.cuda.is_available(),
    reason="Triton's interpreter copies with PyTorch's operators",
)

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "record_stream"}


class _Operators(TorchDispatchMode):
    """Names of the operators that compute something; views and uninitialised tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in NO_LAUNCH:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launched_by(run: Callable[[], Any], device: torch.device) -> tuple[list[str], Any]:
    """Names of what the second of two calls launches, and its result. Memory copies and fills count."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = run()
            torch.cuda.synchronize(device)
        averages = [event for event in profile.key_averages() if event.self_device_time_total > 0]
        return [event.key for event in averages for _ in range(event.count)], result
    with _Operators() as operators, measure.counting_triton() as kernels:
        result = run()
    return operators.names + kernels, result
