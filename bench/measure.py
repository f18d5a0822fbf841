"""How things are measured: time by CUDA events or a clock, memory by the allocator, the ceilings by copies and GEMMs.

On a GPU the L2 cache is overwritten before each sample, so inputs come from device memory ("cold L2"); device time is
what CUDA events say, and the replay of a CUDA graph shows a small operation without its launch overhead ("hot L2").
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], Any]

L2_BYTES = 256 * 2**20  # more than any GPU's L2 cache


def samples_ms(run: Run, device: torch.device, *, seconds: float = 1.0, most: int = 200) -> list[float]:
    """Milliseconds of repeated calls after a warm-up, at least 5 and for about `seconds`."""
    return _cuda_samples(run, seconds, most) if device.type == "cuda" else _clock_samples(run, seconds, most)


def _clock_samples(run: Run, seconds: float, most: int) -> list[float]:
    run()
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - start < seconds and len(samples) < most):
        before = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - before))
    return samples


def _cuda_samples(run: Run, seconds: float, most: int) -> list[float]:
    flush = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    before = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(5, min(most, int(seconds / (time.perf_counter() - before + 1e-4))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def call_us(run: Run, calls: int = 200) -> float:
    """Microseconds of one eager call on a GPU as the host sees it: many calls in a row, one wait at the end."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


def replay_us(run: Run, replays: int = 200) -> float:
    """Microseconds of one replay of a CUDA graph that holds the call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / replays


def peak_extra_bytes(run: Run, device: torch.device, leaves: Sequence[torch.Tensor] = ()) -> int:
    """Most bytes that one call held beyond what was there before it; gradients of `leaves` that it makes count."""
    for leaf in leaves:
        leaf.grad = None  # else the call would begin by giving those of the last one back
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


def copy_gb_per_s(device: torch.device) -> float:
    """The ceiling of memory-bound code: read and written bytes per second of a large copy."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(samples_ms(lambda: target.copy_(source), device, seconds=0.5, most=30))
    return 2 * size / ms / 1e6


def gemm_tflop_per_s(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> float:
    """The ceiling of matrix-bound code: one library GEMM of the very shape, on random data."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    ms = statistics.median(samples_ms(lambda: a @ b.T, device, seconds=0.5, most=30))
    return 2 * m * n * k / ms / 1e9
