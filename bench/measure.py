"""How things are measured: time by CUDA events or a clock, memory by the allocator, launches, ceilings.

On a GPU `triton.testing.do_bench` takes the samples: it overwrites the L2 cache before each one, so inputs come from
device memory ("cold L2"), and reads two CUDA events, with the gaps in which the GPU waits for the host. The replay of a
CUDA graph, flushed in the same way, has no such gaps; `call_us` is what the host sees.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType

from ppo_fast.kernels.common import launch

Run = Callable[[], Any]

FLUSHED = "cold: 256 MiB are written before each sample"  # by triton.testing.do_bench
FLUSH_SECONDS = 2e-4  # of that writing
WARM_UP_CALLS = 3
WARM_UP_MS = 50.0  # a GPU raises its clock in that time
LEAST_SAMPLES = 5
SLOW_SECONDS = 1.0  # of a call on a CPU; then 3 samples do
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far more than caches hold
CALLS = 200


def samples_ms(
    run: Run, device: torch.device, *, seconds: float = 1.0, most: int = 100, warm: bool = False
) -> list[float]:
    """Milliseconds of repeated calls after a warm-up, for about `seconds` and at least 5 (3 of a slow one).

    `warm`: a call was made just before, which is sufficient warm-up for a CPU.
    """
    if device.type == "cuda":
        return _cuda_samples(run, device, seconds, most)
    if not warm:
        run()
    return _clock_samples(run, seconds, most)


def _clock_samples(run: Run, seconds: float, most: int) -> list[float]:
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < (3 if sum(samples) > 6000 else 5) or (
        time.perf_counter() - start < seconds and len(samples) < most
    ):
        before = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - before))
    return samples


def _cuda_samples(run: Run, device: torch.device, seconds: float, most: int) -> list[float]:
    from triton.testing import do_bench  # Triton is missing on some platforms

    run()
    torch.cuda.synchronize()
    before = time.perf_counter()
    run()
    torch.cuda.synchronize()
    per_sample = time.perf_counter() - before + FLUSH_SECONDS
    rep = 1e3 * min(max(seconds, LEAST_SAMPLES * per_sample), most * per_sample)
    samples: list[float] = []
    while len(samples) < LEAST_SAMPLES:  # do_bench divides `rep` by an estimate of its own, which may be longer
        samples += do_bench(run, warmup=WARM_UP_MS, rep=rep, return_mode="all")
    return samples[:: -(-len(samples) // most)]


def replay_ms(run: Run, device: torch.device, *, seconds: float = 0.2) -> list[float]:
    """Milliseconds of replays of a CUDA graph that holds the call: the operation without its launches' overhead."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _cuda_samples(graph.replay, device, seconds, 100)


def call_us(run: Run, seconds: float = 0.5) -> float:
    """Microseconds of one eager call on a GPU, measured on the host: many calls in a row, one wait at the end."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    calls = max(1, min(CALLS, int(seconds / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


def peak_extra_bytes(run: Run, device: torch.device, leaves: Sequence[torch.Tensor] = ()) -> int:
    """Peak bytes of one call above those allocated before it, including the gradients of `leaves`."""
    for leaf in leaves:
        leaf.grad = None  # else the call would first free those of the last one
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def launches(run: Run, device: torch.device) -> int | str:
    """Kernels that one call starts: all of them on a GPU, Triton's in the interpreter, "-" where there are none."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.profiler.kineto_results.events()  # profile.events() takes seconds for a loop over time
        seen = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
        if seen:
            return len(seen)
    if not launch.interpreting():
        return "-"
    with counting_triton() as started:
        run()
    return len(started) or "-"


@contextmanager
def counting_triton() -> Iterator[list[str]]:
    """Names of the Triton kernels that are launched inside the block, compiled or interpreted."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:  # no Triton on this platform
        yield []
        return
    started: list[str] = []
    kept = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(kind: type) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            if not options.get("warmup"):
                started.append(getattr(self, "__name__", ""))
            return kept[kind](self, *arguments, **options)

        return run

    try:
        for kind in kept:
            kind.run = counting(kind)
        yield started
    finally:
        for kind, original in kept.items():
            kind.run = original


def copy_gb_per_s(device: torch.device) -> float:
    """The ceiling of memory-bound code: read and written bytes per second of a large copy."""
    size = COPIED_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(samples_ms(lambda: target.copy_(source), device, seconds=0.5, most=30))
    return 2 * size / ms / 1e6


def gemm_tflop_per_s(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> float:
    """The ceiling of matrix-bound code: one library GEMM of the same shape, on random data."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    ms = statistics.median(samples_ms(lambda: a @ b.T, device, seconds=0.5, most=30))
    return 2 * m * n * k / ms / 1e9
