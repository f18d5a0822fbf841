"""The device of a run, and its properties.

Only this module asks PyTorch about a type of device. All other modules pass the device of a tensor or of the run, and
never use the current device. A run on the CPU calls nothing of CUDA, and so opens no context on a GPU.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ppo_fast.common.errors import UserError
from ppo_fast.ops.backend import Backend, uses_triton

ComputeDtype = Literal["float32", "bfloat16", "float16"]
Model = TypeVar("Model", bound=nn.Module)
SLOW = 2.0  # a cost above which a run in bfloat16 prints a warning
GAIN = 1 / 1.5  # dtype = auto takes bfloat16 up to this cost: autocast also converts weights
HOPELESS = 4.0  # a cost of a small product above which no larger one is measured


def pick_device(name: str, backend: Backend = "auto", dtype: str = "float32") -> torch.device:
    """Return the device `name`, with its index; "auto" is a GPU if there is one.

    Raises:
        UserError: the device does not exist, `backend` cannot compute on it, or `dtype` is bfloat16, which it lacks.
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
            " use --dtype float16 or float32"
        )
    return probe.device


def _check_exists(device: torch.device) -> None:
    """Raise UserError, with the devices of this machine, if a device does not exist."""
    start = f"device {str(device)!r} cannot be used: PyTorch {torch.__version__}"
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "finds no GPU or no driver" if built else "is built for the CPU only"
        raise UserError(f"{start} {reason}; use --device cpu")
    try:
        count = device_module(device).device_count()
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{start} does not support it; use --device cpu") from error
    if device.type != "cpu" and (device.index or 0) >= count:
        names = ", ".join(f"{device.type}:{i}" for i in range(count)) or "none"
        raise UserError(f"device {str(device)!r} does not exist; this machine has {names}")


class DeviceProperties(Protocol):
    """What `get_device_properties` returns, as far as it is used here."""

    name: str
    total_memory: int


class DeviceModule(Protocol):
    """The functions of torch.cuda, torch.xpu, ... that are used here; torch.cpu and torch.mps lack some of them."""

    def device_count(self) -> int: ...
    def device(self, device: torch.device) -> AbstractContextManager: ...
    def get_device_properties(self, device: torch.device) -> DeviceProperties: ...
    def get_rng_state(self, device: torch.device) -> Tensor: ...
    def manual_seed(self, seed: int) -> None: ...
    def max_memory_allocated(self, device: torch.device) -> int: ...
    def set_rng_state(self, new_state: Tensor, device: torch.device) -> None: ...
    def synchronize(self, device: torch.device) -> None: ...


def device_module(device: torch.device) -> DeviceModule:
    """Return torch.cuda, torch.cpu, ...: the module with the functions of the type of a device."""
    return torch.get_device_module(device)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return (major, minor) of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def has_bfloat16(device: torch.device) -> bool:
    """Check whether the device multiplies bfloat16 in hardware.

    On a CPU it is always true: PyTorch emulates it, and `bfloat16_cost` measures how fast.
    """
    capability = compute_capability(device)
    return capability is None or capability >= (8, 0)


@functools.cache
def bfloat16_cost(device: torch.device = torch.device("cpu")) -> float:  # noqa: B008
    """Measure once how many times as long as in fp32 a matrix product takes in bfloat16 on a device.

    0.2 on a CPU with AMX, several hundred on one without any instructions for bfloat16. The sizes double until a
    product takes long enough in fp32 to show the speed of the device, or until bfloat16 is far slower.
    """
    cost = 1.0
    for size in (128, 256, 512, 1024, 2048, 4096):
        full, half = _seconds_of_products(size, (torch.float32, torch.bfloat16), device)
        cost = half / full
        if cost > HOPELESS or (size >= 512 and full > 1e-3):
            break
    return cost


def _seconds_of_products(
    size: int, dtypes: Sequence[torch.dtype], device: torch.device, budget: float = 0.08
) -> list[float]:
    """Measure the shortest times of a product of square matrices, by turns in each dtype, after a first one in each."""
    pairs = [[torch.ones(size, size, dtype=dtype, device=device) for _ in range(2)] for dtype in dtypes]
    rounds: list[list[float]] = []
    while len(rounds) < 3 or (sum(map(sum, rounds)) < budget and len(rounds) < 20):
        times = []
        for rows, weight in pairs:
            synchronize(device)
            start = time.perf_counter()
            torch.mm(rows, weight.T)
            synchronize(device)
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def choose_dtype(dtype: str, device: torch.device) -> tuple[ComputeDtype, str]:
    """Return the dtype of a run for the option `dtype`, and a sentence about it; "" if there is none.

    auto is bfloat16 on a device that multiplies it at least 1.5 times as fast as fp32, by `bfloat16_cost`.

    >>> choose_dtype("float32", torch.device("cpu"))
    ('float32', '')
    """
    chosen: ComputeDtype
    if dtype == "float32":
        return "float32", ""
    if dtype == "float16":
        slow = "warning: dtype = float16 is for GPUs without bfloat16, and slow on a CPU: use --dtype auto"
        return "float16", slow if device.type == "cpu" else ""
    if dtype == "auto" and not has_bfloat16(device):
        text = f"dtype = auto: float32 ({device} does not multiply bfloat16 in hardware; --dtype float16 is faster)"
        return "float32", text
    if device.type != "cpu" and dtype == "bfloat16":
        return "bfloat16", ""
    cost = bfloat16_cost(device)
    chosen = "bfloat16" if dtype == "bfloat16" or cost <= GAIN else "float32"
    measured = f"a product takes {round(cost) if cost > 10 else f'{cost:.2g}'} times as long in bfloat16 as in"
    measured += f" float32 on this {'CPU' if device.type == 'cpu' else 'device'}"
    if dtype == "auto":
        return chosen, f"dtype = auto: {chosen} ({measured})"
    if cost > SLOW:
        return chosen, f"warning: dtype = bfloat16 is slow here ({measured}): use --dtype float32 or auto"
    return chosen, f"dtype = bfloat16: {measured}"


def total_memory(device: torch.device) -> int | None:
    """Return the total memory of a GPU in bytes; None for devices that share the memory of the CPU."""
    if device.type in ("cpu", "mps"):
        return None
    return device_module(device).get_device_properties(device).total_memory


def widest_float(device: torch.device) -> torch.dtype:
    """Return the floating dtype with the most digits that a device computes: fp64, but fp32 on mps."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work that was launched."""
    if device.type != "cpu":
        device_module(device).synchronize(device)


def made_current(device: torch.device) -> AbstractContextManager:
    """Make the device the current one inside this block, as libraries expect that launch kernels from Python."""
    return nullcontext() if device.type == "cpu" else device_module(device).device(device)


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Set the modes of PyTorch for a run inside this block, whatever the caller has set.

    Gradients are recorded, autocast is off, and new tensors are fp32 and on the CPU unless they name something else.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # else without this mode, which every call of PyTorch would pass
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def get_rng_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's default generator; None on a CPU, where it is PyTorch's global one."""
    return None if device.type == "cpu" else device_module(device).get_rng_state(device)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restore what `get_rng_state` returned."""
    device_module(device).set_rng_state(state, device)


def derived_seed(*parts: int) -> int:
    """Compute a seed below 2^32 from several parts, such as a run's seed and the rank of a process, and their order.

    Sums would overlap: seed 0 in rank 1 is not seed 1 in rank 0. Each part is an integer from 0 to 2^32 - 1.

    >>> derived_seed(0, 1) == derived_seed(1, 0)
    False
    >>> derived_seed(0, 1) == derived_seed(0, 1, 0)
    False
    """
    # their number: SeedSequence takes missing parts as zeros
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


def seed(number: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of this device, and of no other device."""
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        with made_current(device):
            device_module(device).manual_seed(number)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device through pinned memory: the host does not wait for the device."""
    if device.type in ("cpu", "mps"):
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def upload_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of one dtype to the device with one copy; return views of one buffer, in their shapes."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    buffer = upload(torch.cat([x.flatten() for x in tensors]), device)
    parts = buffer.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def to_device(model: Model, device: torch.device | str) -> Model:
    """Move a model by its own `to`, which in a quantized one moves more than parameters and buffers."""
    return model.to(device)


def has_weights(model: nn.Module) -> bool:
    """Check that the whole model has memory, and no part of it is on the meta device."""
    return not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
