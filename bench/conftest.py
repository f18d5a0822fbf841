"""Options, record format and the one fixture of the benchmarks.

    pytest bench [--size tiny|small|default|all] [--commit HASH] [--benchmark-json RECORD.json --benchmark-save-data]

A record is pytest-benchmark's JSON; this file adds versions, device and ceilings to its machine_info, and to each row
in extra_info: provider, shape, dtype, raw device samples, bytes and FLOPs, floor, peak extra memory, and error
against fp64.
"""

import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import measure
import pytest
import torch
from torch import Tensor

from ppo_fast.kernels import launch

PACKAGES = (
    "torch",
    "triton",
    "numba",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "verl",
    "torchrl",
    "stable-baselines3",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=("tiny", "small", "default", "all"), default="default", help="which shapes to run"
    )
    parser.addoption("--commit", default=None, help="commit to record where there is no git")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    """The kernels in Triton's interpreter where that is asked for (a dry run), else what the machine has."""
    return "triton" if device.type == "cpu" and launch.interpreting() else "auto"


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> dict[str, float]:
    """Measured once in this very process: what a copy reaches."""
    return {"copy_gb_per_s": measure.copy_gb_per_s(device)}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {}
    for package in PACKAGES:
        try:
            machine_info["versions"][package] = version(package)
        except PackageNotFoundError:
            machine_info["versions"][package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    if config.getoption("--commit"):
        commit_info["id"] = config.getoption("--commit")


@pytest.fixture
def compare(benchmark, device: torch.device, ceilings: dict[str, float], request: pytest.FixtureRequest) -> Callable:
    """compare(run, provider=..., shape=..., dtype=..., bytes=..., results=..., truth=...): measures one row."""

    def measured(
        run: Callable[[], Any],
        *,
        operation: str,
        provider: str,
        shape: str,
        dtype: str,
        bytes: int,
        flops: int = 0,
        results: Callable[[], list[Tensor]] | None = None,
        truth: list[Tensor] | None = None,
        leaves: Sequence[Tensor] = (),
    ) -> None:
        benchmark.group = f"{operation} {shape} {dtype}"
        info = benchmark.extra_info
        info.update(operation=operation, provider=provider, shape=shape, dtype=dtype, bytes=bytes, flops=flops)
        if results is not None and truth is not None:
            info["max_error"] = max_error(results(), truth)
        seconds = {"tiny": 0.01, "small": 0.2, "default": 1.0, "all": 2.0}[request.config.getoption("--size")]
        info["samples_ms"] = measure.samples_ms(run, device, seconds=seconds)
        info["peak_extra_bytes"] = measure.peak_extra_bytes(run, device, leaves)
        info["copy_gb_per_s"] = ceilings["copy_gb_per_s"]
        info["floor_ms"] = bytes / ceilings["copy_gb_per_s"] / 1e6
        info["share_of_floor"] = info["floor_ms"] / statistics.median(info["samples_ms"])
        info["l2"] = "cold" if device.type == "cuda" else "as it comes"

        def once() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=5, warmup_rounds=1)

    return measured


def max_error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Largest absolute error over all results, against fp64."""
    return max((r.double() - t.double()).abs().max().item() for r, t in zip(results, truth, strict=True))
