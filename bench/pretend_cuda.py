"""A simulated GPU: PyTorch reports that it has CUDA, and everything runs on the CPU.

    python bench/pretend_cuda.py [-m] SCRIPT_OR_MODULE ARGUMENTS

For dry runs (`bash bench/on_gpu.sh OUT PART COMMIT dry`): each line that is only for a GPU runs, on its own shapes and
dtypes, so that a typo costs no time on a GPU. Kernels run compiled, in the PTX interpreter of tests/ptx. The
numbers mean nothing. What a real GPU would reject is rejected here, too: waiting inside a captured graph, replaying an
empty one, reading an event before it has happened.
"""

import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import json_lines  # noqa: F401  # before torch
import measure
import torch
import torch.nn.attention.varlen
import triton.testing
from ptx.emulator import Emulator
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class OnTheCPU(TorchFunctionMode):
    """A mode in which tensors that are requested on the GPU are made on the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.device or function is torch.ops.profiler._record_function_exit:
            return function(*args, **(kwargs or {}))
        if function is torch.Tensor.pin_memory:  # no accelerator could read it
            return args[0]
        return function(*map(moved, args), **{name: moved(x) for name, x in (kwargs or {}).items()})


def moved(x: Any) -> Any:
    if isinstance(x, torch.device):
        return CPU if x.type == "cuda" else x
    return "cpu" if isinstance(x, str) and x == "cuda" else x


class Machine:
    """The state of the simulated GPU: what was captured and waited for."""

    capturing = False
    waits = 0


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.when: float | None = None

    def record(self) -> None:
        self.when, self.waits = time.perf_counter(), Machine.waits

    def elapsed_time(self, later: "Event") -> float:
        assert self.when is not None, "never recorded"
        assert later.when is not None, "never recorded"
        assert Machine.waits > later.waits, "not yet happened"
        return 1e3 * (later.when - self.when)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Graph:
    captured = False

    def replay(self) -> None:
        assert self.captured, "nothing was captured"
        assert not Machine.capturing


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    Machine.capturing = True
    yield
    Machine.capturing, graph.captured = False, True


def wait(device: object = None) -> None:
    if Machine.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    Machine.waits += 1


class Profile:
    """One kernel, one operation of the host, one annotation."""

    def __init__(self, **options: Any) -> None: ...

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def profiler(self) -> SimpleNamespace:
        kinds = ((DeviceType.CUDA, False), (DeviceType.CPU, False), (DeviceType.CUDA, True))
        events = [SimpleNamespace(device_type=lambda d=d: d, is_user_annotation=lambda n=n: n) for d, n in kinds]
        return SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))


def varlen_attn(
    query: torch.Tensor,  # [total, heads, d]
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.attention.varlen, sequence by sequence, with its checks of arguments."""
    assert {x.dtype for x in (query, key, value)} in ({torch.bfloat16}, {torch.float16}), "wants fp16 or bf16"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert type(max_q) is int
    assert window_size[1] == 0, "everything here is causal"
    assert enable_gqa or query.shape[1] == key.shape[1]
    outputs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        band = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        band = band if window_size[0] < 0 else band.triu(-window_size[0])
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs.append(attend(q, k, v, attn_mask=band, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def do_bench(run: Callable[[], object], warmup: float = 25, rep: float = 100, return_mode: str = "mean") -> list[float]:
    """triton.testing.do_bench with two samples."""
    assert return_mode == "all"
    events = [(Event(enable_timing=True), Event(enable_timing=True)) for _ in range(2)]
    for first, last in events:
        first.record()
        run()
        last.record()
    wait()
    return [first.elapsed_time(last) for first, last in events]


PROPERTIES = SimpleNamespace(name="no GPU: a dry run", total_memory=2**30, multi_processor_count=1, major=9, minor=0)
STAND_INS = {
    "is_available": lambda: True,
    "synchronize": wait,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda stream: nullcontext(),
    "current_stream": Stream,
    "device": lambda device: nullcontext(),
    "CUDAGraph": Graph,
    "graph": capture,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "mem_get_info": lambda device=None: (2**28, 2**30),
    "device_count": lambda: 1,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda index: PROPERTIES,
}


@contextmanager
def pretending() -> Iterator[None]:
    """Inside this block PyTorch reports CUDA, and Triton's kernels run in the interpreter; stand-ins stay after it."""
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    torch.nn.attention.varlen.varlen_attn = varlen_attn
    torch.cuda.tunable.is_enabled = lambda: False
    torch.profiler.profile = Profile  # PyTorch's own would warn about each operation
    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    torch.cuda.nvtx.range = lambda message: nullcontext()
    triton.testing.do_bench = do_bench
    measure.COPIED_BYTES = {"cuda": 2**20}
    measure.WARM_UP_CALLS, measure.LEAST_SAMPLES, measure.CALLS = 1, 2, 1
    run = threading.Thread.run

    def run_on_the_cpu(thread: threading.Thread) -> None:  # a mode is that of one thread
        with OnTheCPU():
            run(thread)

    threading.Thread.run = run_on_the_cpu
    with Emulator().installed(), OnTheCPU():
        yield


def main(arguments: Sequence[str]) -> None:
    """Run a script, or with -m a module, as python does."""
    module, target = arguments[0] == "-m", arguments[arguments[0] == "-m"]
    sys.argv = [target, *arguments[1 + module :]]
    with pretending():
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
