"""The context of an autograd.Function, and Function.apply with less Python."""

from collections.abc import Callable
from typing import Never, Protocol, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common.memory import transforms_active

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result", covariant=True)
_Saved = TypeVar("_Saved", covariant=True)


class Context(Protocol[_Saved]):
    """The first argument of an autograd.Function's methods. A subclass declares the attributes that forward sets."""

    @property
    def saved_tensors(self) -> _Saved: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Function(Protocol[*_Arguments, _Result]):
    """A subclass of autograd.Function."""

    @staticmethod
    def forward(ctx: Never, /, *args: *_Arguments) -> _Result: ...


def direct_apply(function: _Function[*_Arguments, _Result]) -> Callable[[*_Arguments], _Result]:
    """Return `function.apply` for arguments that belong to no transform of torch.func.

    Function.apply checks for a setup_context, and for tensors of torch.func in all arguments, before it calls the apply
    of its base class: 1.5 to 2 us. The public operations reject those tensors already. While a transform is active this
    is function.apply, which raises its own error.
    """
    checked: Callable[[*_Arguments], _Result] = vars(torch.autograd.Function)["apply"].__get__(None, function)
    apply: Callable[[*_Arguments], _Result] = vars(torch._C._FunctionBase)["apply"].__get__(None, function)

    def run(*args: *_Arguments) -> _Result:
        return (checked if transforms_active() else apply)(*args)

    return run
