"""Registers the device "testgpu" with PyTorch, at the first use in a process. Nothing can unregister it."""

import contextlib
import functools
import re
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerator import build, stand_ins, waits

NAME = "testgpu"
TOTAL_MEMORY = 80 << 30  # bytes that each device claims to have, an H100's; nothing is checked against them


def register() -> None:
    """Build the device if necessary and make `torch.device("testgpu")` work.

    Raises:
        CannotBuild: this machine has no C++ compiler.
    """
    _extension()


@functools.cache
def _extension() -> types.ModuleType:
    extension = build.load(build.build())
    extension.set_unchecked_operations(unchecked_operations())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, device_module(extension))  # type: ignore[arg-type]
    extension.register_hooks()
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    waits.connect(extension.set_wait_hook)
    stand_ins.register()
    return extension


def unchecked_operations() -> set[str]:
    """The operations for which PyTorch generates no check that all tensors are on one device, from PyTorch's list."""
    spec = find_spec("torchgen")  # installed with torch
    assert spec is not None
    assert spec.origin is not None
    listed = Path(spec.origin).parent / "packaged/ATen/native/native_functions.yaml"
    entries = re.split(r"^- func: ", listed.read_text(), flags=re.MULTILINE)[1:]
    return {f"aten::{entry.split('(')[0]}" for entry in entries if re.search(r"^  device_check: NoCheck", entry, re.M)}


def device_module(extension: types.ModuleType) -> types.ModuleType:
    """torch.testgpu: what code asks of torch.cuda."""
    module = types.ModuleType(f"torch.{NAME}")

    def index_of(device: Any = None) -> int:
        """The index of a device, a name or a number; the current one's where there is none."""
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return extension.current_device() if index is None else index

    class device:
        """Makes a device the current one inside a block."""

        def __init__(self, device: Any) -> None:
            self.index = index_of(device)

        def __enter__(self) -> None:
            self.before = extension.current_device()
            extension.set_device(self.index)

        def __exit__(self, *_: object) -> None:
            extension.set_device(self.before)

    def generator(device: Any) -> torch.Generator:
        return extension.default_generator(index_of(device))

    def set_rng_state(state: torch.Tensor, device: Any = NAME) -> None:
        if state.device.type != "cpu":  # as torch.cuda.set_rng_state demands
            raise TypeError(f"set_rng_state needs a tensor on the CPU, got one on {state.device}")
        generator(device).set_state(state)

    def manual_seed_all(seed: int) -> None:
        for i in range(extension.DEVICES):
            generator(i).manual_seed(seed)

    def memory_stats(device: Any = None) -> dict[str, int]:
        """As torch.cuda.memory_stats, with the few entries that this device counts."""
        current, peak, allocations = extension.memory(index_of(device))
        return {
            "allocated_bytes.all.current": current,
            "allocated_bytes.all.peak": peak,
            "allocation.all.allocated": allocations,
        }

    def stream(device: Any = None, priority: int = 0) -> torch.Stream:
        """There is one stream, and it is always idle."""
        return torch.Stream(device=torch.device(NAME, index_of(device)))

    functions = {
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": lambda *args, **options: torch.Event(NAME),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: extension.DEVICES,
        "current_device": extension.current_device,
        "set_device": lambda device: extension.set_device(index_of(device)),
        "device": device,
        "synchronize": lambda device=None: waits.report("synchronize", f"{NAME}:{index_of(device)}"),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "manual_seed": lambda seed: generator(None).manual_seed(seed),
        "manual_seed_all": manual_seed_all,
        "initial_seed": lambda: generator(None).initial_seed(),
        "get_rng_state": lambda device=NAME: generator(device).get_state(),  # no wait on CUDA: the state is the host's
        "set_rng_state": set_rng_state,
        "memory_stats": memory_stats,
        "memory_allocated": lambda device=None: memory_stats(device)["allocated_bytes.all.current"],
        "max_memory_allocated": lambda device=None: memory_stats(device)["allocated_bytes.all.peak"],
        "reset_peak_memory_stats": lambda device=None: extension.reset_peak_memory(index_of(device)),
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: types.SimpleNamespace(name=NAME, total_memory=TOTAL_MEMORY),
        "mem_get_info": lambda device=None: (TOTAL_MEMORY - extension.memory(index_of(device))[0], TOTAL_MEMORY),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
