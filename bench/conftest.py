"""Options, record format and fixtures of the benchmarks.

    pytest bench [--size tiny|small|default|all] [--commit HASH] [--record RECORD.jsonl]

A record has a header with machine, versions and commit, and a line for each row, written as soon as it is measured.
(Or it is pytest-benchmark's JSON, written at the end: --benchmark-json; that package is needed for nothing else.) A row
has provider, shape, dtype, raw samples, bytes and FLOPs by design, the two ceilings measured in this process and the
floor that follows from them, peak extra memory, launches, and error against fp64. README.md explains them.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import json_lines
import measure
import pytest
import torch
from torch import Tensor

from ppo_fast.kernels.common import launch

SECONDS = {"tiny": 0.01, "small": 0.1, "default": 0.2, "all": 1.0}  # of sampling, for one row
STARTED = pytest.StashKey[float]()
RECORD = pytest.StashKey[json_lines.Writer | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=SECONDS, default="default", help="which shapes to run")
    parser.addoption("--commit", default=None, help="commit to record where there is no git")
    parser.addoption("--record", type=Path, default=None, help="file for a line of JSON for each row")
    parser.addoption("--budget", type=float, default=None, help="seconds after which the remaining rows are skipped")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.monotonic()
    path = session.config.getoption("--record")
    if path is not None and (problem := json_lines.foreign(path)):
        raise pytest.UsageError(problem)
    commit = session.config.getoption("--commit") or "unknown"
    session.config.stash[RECORD] = None if path is None else json_lines.Writer(path, commit)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None:
        terminalreporter.write_line(f"the record is {path}; python bench/report.py {path} makes tables and pictures")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the run before it is killed: the record of pytest-benchmark is written at its end."""
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip(f"the budget of {budget:g} s is spent")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    """The kernels in Triton's interpreter in a dry run, else the backend of the machine."""
    return "triton" if launch.interpreting() else "auto"


@pytest.fixture(scope="session")
def copy_gb_per_s(device: torch.device) -> float:
    """The rate of a copy, measured once in this process."""
    return measure.copy_gb_per_s(device)


@pytest.fixture(scope="session")
def gemm_tflop_per_s(device: torch.device) -> Callable[[torch.dtype, int, int, int], float]:
    """(dtype, m, n, k) -> the rate of one library GEMM of that shape, measured once for each in this process."""
    return functools.cache(functools.partial(measure.gemm_tflop_per_s, device))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= json_lines.machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    if config.getoption("--commit"):
        commit_info["id"] = config.getoption("--commit")


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Any:
    """The fixture that stores a row: pytest-benchmark's, or a substitute for it without that package."""
    if request.config.pluginmanager.hasplugin("benchmark"):
        return request.getfixturevalue("benchmark")
    return SimpleNamespace(extra_info={}, group="", stats=None, pedantic=lambda function, rounds: function())


@pytest.fixture
def compare(
    row: Any,
    device: torch.device,
    copy_gb_per_s: float,
    gemm_tflop_per_s: Callable[[torch.dtype, int, int, int], float],
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., None]]:
    """compare(run, operation=..., provider=..., ...): measure one row and store it."""

    def measured(
        run: Callable[[], Any],
        *,
        operation: str,
        provider: str,
        shape: str,  # "N=1024 V=32000": the report plots along these
        dtype: str,
        bytes: int,  # that an implementation has to move at least
        flops: int = 0,  # of its matrix products
        gemm: tuple[int, int, int] | None = None,  # m, n, k of those: the ceiling is measured at this shape
        results: Callable[[], list[Tensor]] | None = None,
        truth: list[Tensor] | None = None,  # fp64
        leaves: Sequence[Tensor] = (),  # whose gradients the call makes
        small: bool = False,  # on a GPU also the host's time of a call
        replay: bool = False,  # ... and the time in a CUDA graph
    ) -> None:
        row.group = f"{operation} {shape} {dtype}"
        info = row.extra_info
        info.update(operation=operation, provider=provider, shape=shape, dtype=dtype, bytes=bytes, flops=flops)
        info["copy_gb_per_s"] = copy_gb_per_s
        info["floor_ms"] = bytes / copy_gb_per_s / 1e6
        if gemm is not None:
            info["gemm"] = "x".join(map(str, gemm))
            info["gemm_tflop_per_s"] = gemm_tflop_per_s(getattr(torch, dtype), *gemm)
            info["floor_ms"] = max(info["floor_ms"], flops / info["gemm_tflop_per_s"] / 1e9)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        compared = results is not None and truth is not None
        try:
            info["max_error"] = max_error(results(), truth) if compared else None
            measure_row(run, leaves, warm=compared)
        except torch.OutOfMemoryError:
            info["out_of_memory"] = True
            pytest.skip(f"{provider} runs out of memory at {shape}")
        if device.type == "cuda" and (small or replay):
            info["call_us"] = measure.call_us(run)
        if device.type == "cuda" and replay:
            measure_replay(run)

    def measure_row(run: Callable[[], Any], leaves: Sequence[Tensor], *, warm: bool) -> None:
        info, samples = row.extra_info, []
        seconds = SECONDS[request.config.getoption("--size")]
        row.pedantic(lambda: samples.extend(measure.samples_ms(run, device, seconds=seconds, warm=warm)), rounds=1)
        info["samples_ms"] = rounded(samples)
        if row.stats is not None:  # None with --benchmark-disable
            row.stats.stats.data[:] = [ms / 1e3 for ms in samples]  # its own table then shows these samples
        info["l2"] = measure.FLUSHED if device.type == "cuda" else "as it comes"
        info["share_of_floor"] = info["floor_ms"] / statistics.median(samples)
        info["peak_extra_bytes"] = measure.peak_extra_bytes(run, device, leaves)
        info["launches"] = measure.launches(run, device)

    def measure_replay(run: Callable[[], Any]) -> None:
        info = row.extra_info
        try:
            info["replay_ms"] = rounded(measure.replay_ms(run, device))
            info["share_of_floor_in_replay"] = info["floor_ms"] / statistics.median(info["replay_ms"])
        except RuntimeError as error:  # a call that cannot be captured still has its other numbers
            info["replay_failed"] = str(error).splitlines()[0]

    yield measured
    writer = request.config.stash[RECORD]
    if writer is not None and row.extra_info:
        writer.add(row.extra_info)


def rounded(samples: list[float]) -> list[float]:
    """Round to nanoseconds: records stay in the repository."""
    return [round(ms, 6) for ms in samples]


def max_error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Largest absolute error over all results, against fp64."""
    return max((r.double() - t.double()).abs().max().item() for r, t in zip(results, truth, strict=True))
