"""The public operations with one backend, as tests of the kernels call them.

On a CPU the interpreter of tests/ptx runs the Triton kernels; it makes `backend="triton"` accept CPU tensors.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import ppo_fast as ppo


class Operations:
    """Every operation of ppo_fast, with `backend` given."""

    def __init__(self, backend: str) -> None:
        self.name = backend
        for name in ppo.__all__:
            if name[0].islower():
                setattr(self, name, partial(getattr(ppo, name), backend=backend))

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"ppo_fast has no operation {name!r}")


TRITON, TORCH = Operations("triton"), Operations("torch")
BACKENDS = {"triton": TRITON, "torch": TORCH}


@pytest.fixture
def values_unread() -> Iterator[None]:
    """The checks read no values of tensors, as for tensors on a GPU."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        patch.setattr("ppo_fast.ops.checks.readable", lambda x: False)
        yield
