"""Settings that every test shares.

Without a GPU, Triton kernels run on CPU tensors as compiled code, in the PTX interpreter of tests/ptx. With
TRITON_INTERPRET=1 they run in Triton's interpreter, which proves less.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_fast.common.threads import wait_passively

if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
wait_passively()

import torch  # noqa: E402

from ppo_fast.common import device as devices  # noqa: E402

EMULATED = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if EMULATED:
    from ptx import record
    from ptx.emulator import Emulator, Launch, poisoned_allocations

elif not torch.cuda.is_available():
    from support import triton_interpreter

    triton_interpreter.round_fma_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compiled kernels")
    group.addoption("--architecture", default="sm_90", help="architecture that kernels are compiled for")
    group.addoption("--ptx-seed", type=int, default=0, help="seed of program order and approximate instructions")
    group.addoption("--ptx-noise", type=float, default=1.0, help="share of the manual's error bounds that is used")
    group.addoption("--ptx-record", type=Path, help="folder for a count of tests and issues of each compiled variant")


@pytest.fixture(scope="session")
def emulator(pytestconfig: pytest.Config) -> "Iterator[Emulator | None]":
    """The interpreter of compiled kernels; None on a GPU and under TRITON_INTERPRET=1."""
    if not EMULATED:
        yield None
        return
    option = pytestconfig.getoption
    noise = {"seed": option("ptx_seed"), "amplitude": option("ptx_noise")}
    with Emulator(option("architecture"), **noise, modules="ppo_fast").installed() as found:
        yield found
    if option("ptx_record"):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        record.write_counts(option("ptx_record") / f"{worker}.json", _CASES, found)


_CASES: "Counter[Launch]" = Counter()  # tests that launched each variant


@pytest.fixture(autouse=True)
def compiled_kernels_without_issues(emulator: "Emulator | None") -> Iterator[None]:
    """A test fails if a kernel that it launched reads, writes or synchronises wrongly. New tensors are poisoned."""
    if emulator is None:
        yield
        return
    emulator.issues.clear()
    emulator.number = 0
    emulator.padded.clear()
    before = emulator.launches.copy()
    with poisoned_allocations():
        yield
    _CASES.update(launch for launch, count in emulator.launches.items() if count > before[launch])
    if emulator.issues:
        found = "\n".join(f"{count} times {issue}" for issue, count in emulator.issues.items())
        pytest.fail(f"seed {emulator.seed}, {emulator.target}:\n{found}", pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def auto_is_float32() -> Iterator[None]:
    """With dtype = auto tests compute in fp32 on every processor. Other processes must be given a dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "bfloat16_cost", lambda device=None: 1000.0)
        yield


@pytest.fixture
def programs_may_overlap(emulator: "Emulator | None") -> Iterator[None]:
    """For a test with input that is wrong in a way that only the device could see: several programs or warps may then
    access the same bytes, but no address may leave its tensor."""
    yield
    for issue in list(emulator.issues if emulator else ()):
        if "another" in issue.message:
            del emulator.issues[issue]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_EMPTY = ("empty", "empty_like", "empty_strided")


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN (floats) or a huge number (integers): a test fails if an element is not written."""
    if EMULATED:  # poisoned in every test
        yield
        return

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)

        return empty

    for name in _EMPTY:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test that can run on a GPU; those that need one are skipped where there is none."""
    for item in items:
        needs = item.get_closest_marker("needs_gpu") is not None
        if needs or "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if needs and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
    if "families" not in config.option.markexpr:  # they take minutes
        left_out = [item for item in items if item.get_closest_marker("families") is not None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("families") is None]
