"""Fixtures with the test device, and when it is registered."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerator import build, registration, stand_ins

FOLDER = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the device before the first test, if any test of this folder will run.

    Autograd makes its threads, one for each device, in a process's first backward: a device that is registered later
    can have no backward.
    """
    if session.config.option.collectonly or torch.cuda.is_available():
        return
    if any(FOLDER in item.path.parents for item in session.items):
        with contextlib.suppress(build.CannotBuild):  # the fixture skips these tests with its message
            registration.register()


@pytest.fixture(scope="session")
def _registered() -> None:
    if torch.cuda.is_available():  # PyTorch takes pinned memory from one kind of accelerator only
        pytest.skip("the test device stands for a GPU, and this machine has one")
    try:
        registration.register()
    except build.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture
def testgpu(_registered: None) -> Iterator[torch.device]:
    """The first test device, which is the current one."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # Module.to replaces the tensor of a parameter on CUDA. Here it can only be swapped: PyTorch allows no `.data` of
    # another kind of tensor to a backend like this one.
    torch.__future__.set_swap_module_params_on_conversion(True)
    stand_ins.varlen_calls.clear()
    torch.testgpu.set_device(0)
    yield torch.device("testgpu:0")
    torch.testgpu.set_device(0)
    torch.__future__.set_swap_module_params_on_conversion(swaps)


@pytest.fixture
def second_testgpu(testgpu: torch.device) -> torch.device:
    """The second test device, while the first is the current one."""
    return torch.device("testgpu:1")


@pytest.fixture
def as_cuda(testgpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The first test device, and both are an H100 to the project: choices by compute capability are those of a GPU."""
    from ppo_fast.common import device as project_device

    asked = project_device.compute_capability
    monkeypatch.setattr(
        project_device,
        "compute_capability",
        lambda device: (9, 0) if device.type == registration.NAME else asked(device),
    )
    return testgpu
