"""Launches of Triton kernels on CPU tensors, as compiled code.

`Emulator` replaces `JITFunction.run`: it lets Triton specialise the launch as it would on a GPU, compiles the
kernel for one architecture, and runs the PTX. Triton's own cache keeps what was compiled.
"""

import contextlib
import ctypes
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from ptx.arithmetic import Approximations
from ptx.machine import Issue, Kernel, Machine
from ptx.memory import Segment
from ptx.translate import POISON
from torch.utils._device import _device_constructors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
_LARGEST_POISONED = 1 << 30  # bytes; filling more would take memory without a use
_LARGEST_GRID = (2**31 - 1, 65535, 65535)  # of a GPU of NVIDIA
_ALLOCATORS = ("empty", "empty_like", "empty_strided")


class Launch(NamedTuple):
    """What determines the compiled code of a launch: one variant of a kernel."""

    kernel: JITFunction
    types: tuple[tuple[str, str], ...]  # argument and type, without constexprs
    constexprs: tuple[tuple[str, Any], ...]
    attributes: tuple[Any, ...]  # what Triton assumes of values and alignments
    options: tuple[tuple[str, Any], ...]  # those that the launcher chose


def bytes_of(tensor: torch.Tensor) -> tuple[int, np.ndarray]:
    """Address and bytes of a CPU tensor's storage."""
    storage = tensor.untyped_storage()
    size, address = storage.nbytes(), storage.data_ptr()
    if not size:
        return address, np.empty(0, np.uint8)
    return address, np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)


def element_bytes(tensor: torch.Tensor) -> int:
    """Bytes of an element, with 4 for int8: by chance it holds one byte of the pattern of unwritten memory."""
    size = tensor.element_size()
    return size if size > 1 or tensor.dtype is torch.bool else 4


def elements_inside(tensors: list[torch.Tensor]) -> np.ndarray | None:
    """For each element of a storage, whether one of its tensors has it; None if one has all, or it is huge."""
    storage, size = tensors[0].untyped_storage().nbytes(), tensors[0].element_size()
    if storage > _LARGEST_POISONED or any(x.element_size() != size or x.numel() * size == storage for x in tensors):
        return None
    inside = np.zeros(storage // size, bool)  # NumPy: a test may count the operations of PyTorch
    for x in tensors:
        np.lib.stride_tricks.as_strided(inside[x.storage_offset() :], x.shape, x.stride())[...] = True
    return inside


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill the storage of a plain CPU tensor with a pattern that the interpreter recognises as never written."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":  # a FakeTensor has no memory
        return tensor
    if 0 < tensor.untyped_storage().nbytes() <= _LARGEST_POISONED:
        _, data = bytes_of(tensor)
        words = len(data) // 4 * 4
        data[:words].view(np.uint32)[:] = POISON
        data[words:] = np.frombuffer(np.uint32(POISON).tobytes(), np.uint8)[: len(data) - words]
    return tensor


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its relatives return poisoned memory."""

    def wrap(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return functools.wraps(make)(lambda *args, **kwargs: poison(make(*args, **kwargs)))

    _device_constructors()  # `with torch.device(...)` compares functions by identity
    owners = [(torch, name) for name in _ALLOCATORS] + [(torch.Tensor, "new_empty")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in owners]
    try:
        for owner, name, make in originals:
            setattr(owner, name, wrap(make))
        yield
    finally:
        for owner, name, make in originals:
            setattr(owner, name, make)


class Emulator:
    """Runs launches and keeps what they did wrong."""

    def __init__(
        self, architecture: str = "sm_90", *, seed: int = 0, amplitude: float = 1.0, modules: str = ""
    ) -> None:
        """seed: of the order of programs and of the noise of approximate instructions, whose size is `amplitude`.

        Issues are kept for kernels of modules whose names start with `modules`; other kernels run unchecked.
        """
        self.modules = modules
        self.target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
        self.backend = make_backend(self.target)
        self.seed = seed
        self.approximate = Approximations(seed, amplitude)
        self.issues: Counter[Issue] = Counter()
        self.launches: Counter[Launch] = Counter()
        self.faults: Counter[Launch] = Counter()  # issues of each variant
        self.padded: set[tuple[int, int]] = set()  # address and bytes of the storages whose padding may be written
        self.number = 0  # of launches since a test began: with the seed it determines the order of programs
        self.contract = False
        self.runs = True  # whether launches are executed, or only written down
        self.rewrite: Callable[[str], str] = lambda ptx: ptx  # applied to PTX before it runs, for tests of detectors
        self.short: str | None = None  # argument whose memory ends one element early, likewise
        self._binders: dict[JITFunction, Callable[..., Any]] = {}
        self._kernels: dict[tuple[JITFunction, str], tuple[Launch, Any]] = {}
        self._translations: dict[str, Kernel] = {}

    def launch(self, function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        """What JITFunction.run does on a GPU. (`function` is its self.)"""
        binder = self._binders.get(function)
        if binder is None:
            binder = create_function_from_signature(function.signature, function.params, self.backend)
            self._binders[function] = binder
        bound, specialization, options = binder(*args, **kwargs)
        key = function, str((specialization, options))
        if key not in self._kernels:
            self._kernels[key] = self.specialise(function, kwargs, bound, specialization, options), None
        launch, compiled = self._kernels[key]
        self.launches[launch] += 1
        if not self.runs:
            return
        if compiled is None:
            compiled = self.compile(launch)
            self._kernels[key] = launch, compiled
        size = grid(bound) if callable(grid) else grid
        names = [name for name, _ in launch.types]
        size = (*size, 1, 1)[:3]
        if any(n > largest for n, largest in zip(size, _LARGEST_GRID, strict=True)):
            raise ValueError(f"{launch.kernel.__name__}: no GPU can run a grid of {size}")
        self.execute(compiled, [bound[name] for name in names], launch, size)

    def specialise(
        self, function: JITFunction, kwargs: dict[str, Any], bound: Any, specialization: Any, options: Any
    ) -> Launch:
        chosen = {name: x for name, x in kwargs.items() if name not in function.arg_names}
        _, signature, constexprs, attributes = function._pack_args(self.backend, chosen, bound, specialization, options)
        names = function.arg_names
        fixed = {names[path[0]]: x for path, x in constexprs.items()}
        assumed = tuple(sorted((names[path[0]], str(x)) for path, x in attributes.items() if x))
        types = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
        return Launch(function, types, tuple(sorted(fixed.items())), assumed, tuple(sorted(chosen.items())))

    def compile(self, launch: Launch) -> Any:
        compiled = compile_launch(launch, self.target)
        for line in arithmetic_on_bools(compiled.asm["source"]):
            self.issues[Issue(launch.kernel.__name__, "integer arithmetic on bools, modulo 2", line, "")] += 1
        return compiled

    def kernel(self, ptx: str) -> Kernel:
        text = self.rewrite(ptx)
        if text not in self._translations:
            self._translations[text] = Kernel(text, contract=self.contract)
        return self._translations[text]

    def execute(self, compiled: Any, arguments: list[Any], launch: Launch, grid: tuple[int, int, int]) -> None:
        kernel = self.kernel(compiled.asm["ptx"])
        parameters: dict[str, Any] = {}
        segments: dict[int, tuple[np.ndarray, list[str], list[torch.Tensor]]] = {}
        declared = kernel.program.parameters
        for (_, parameter), (name, kind), value in zip(declared, launch.types, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                address, data = bytes_of(value)
                data = data[: -value.element_size()] if name == self.short else data
                _, names, tensors = segments.setdefault(address, (data, [], []))
                names.append(name)
                tensors.append(value)
                parameters[parameter] = np.uint64(value.data_ptr())
            elif kind == "fp32":
                parameters[parameter] = np.float32(value).view(np.uint32)
            elif kind == "fp64":
                parameters[parameter] = np.float64(value).view(np.uint64)
            else:
                width = 8 if kind in ("i1", "u1") else int(kind[1:])
                parameters[parameter] = np.uint64(int(value) % 2**width)
        for _, parameter in declared[len(arguments) :]:  # scratch memory that Triton adds; these kernels need none
            parameters[parameter] = np.uint64(0)
        memory = [
            Segment(
                address,
                data,
                "/".join(names),
                min(map(element_bytes, tensors)),
                None if (address, len(data)) in self.padded else elements_inside(tensors),
            )
            for address, (data, names, tensors) in segments.items()
        ]
        machine = Machine(kernel, memory, compiled.metadata.shared)
        self.number += 1
        machine.run(parameters, grid, self.approximate, self.seed + self.number)
        if launch.kernel.module.startswith(self.modules):
            self.issues += machine.issues
            self.faults[launch] += sum(machine.issues.values())

    @contextlib.contextmanager
    def installed(self) -> Iterator["Emulator"]:
        """Every launch of a Triton kernel runs here, and the launchers accept CPU tensors.

        Row kernels may store to the padding of a chunk of logits, and must ignore what they load from it: it is filled
        with NaN.
        """
        from ppo_fast.kernels.common import launch
        from ppo_fast.kernels.linear import chunks as linear_chunks

        originals = JITFunction.run, launch.interpreting, linear_chunks.chunk_buffer

        def chunk_buffer(*args: Any, **kwargs: Any) -> torch.Tensor:
            buffer = originals[2](*args, **kwargs)
            if type(buffer) is not torch.Tensor:  # a FakeTensor has no memory
                return buffer
            rows, V = buffer.shape
            self.padded.add((buffer.untyped_storage().data_ptr(), buffer.untyped_storage().nbytes()))
            # in half precision the padding is 0, since oneDNN's products multiply it
            if buffer.stride(0) > V and buffer.dtype not in (torch.float16, torch.bfloat16):
                buffer.as_strided((rows, buffer.stride(0)), (buffer.stride(0), 1))[:, V:].fill_(torch.nan)
            return buffer

        JITFunction.run = lambda function, *args, **kwargs: self.launch(function, *args, **kwargs)
        launch.interpreting, linear_chunks.chunk_buffer = (lambda: True), chunk_buffer
        try:
            yield self
        finally:
            JITFunction.run, launch.interpreting, linear_chunks.chunk_buffer = originals


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a launch."""
    function, types = launch.kernel, dict(launch.types)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name, _ in launch.attributes}
    source = ASTSource(function, signature, dict(launch.constexprs), attributes)
    options = {k: x for k, x in launch.options if k != "maxnreg" or target.backend == "cuda"}
    return triton.compile(source, target=target, options=options)


def arithmetic_on_bools(source: str) -> list[str]:
    """Sums, differences and products of bools in the IR that Triton makes from the source of a kernel.

    Flags that come out of a tuple are of type i1 there, so that True + True is False; Python's bools add as integers.
    """
    return [line.split(" loc(")[0].strip() for line in _BOOLS.findall(source)]


_BOOLS = re.compile(r"^.*arith\.(?:addi|subi|muli) .*: (?:i1|tensor<[^>]*xi1(?:,[^>]*)?>).*$", re.MULTILINE)


if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError("TRITON_INTERPRET=1 is set: Triton then makes interpreted kernels, which cannot be compiled")
