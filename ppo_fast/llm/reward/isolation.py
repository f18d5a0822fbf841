"""Isolation: what a reward function changes in the process is restored after its call."""

import decimal
import functools
import locale
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from types import FrameType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.utils.deterministic

from ppo_fast.common import device as devices
from ppo_fast.common.errors import RewardError

T = TypeVar("T")


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch (on the CPU and on `device`), numpy and random, and restore their states after the block."""
    python, array = random.getstate(), np.random.get_state()
    on_cpu, on_device = torch.get_rng_state(), devices.get_rng_state(device)
    devices.seed(seed, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            devices.set_rng_state(on_device, device)
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def isolated(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Restore random states and settings after the call of the reward function `name` in this block.

    Its random numbers start from `seed`. A setting that it changed is named in a RuntimeWarning, once in a process.

    Raises:
        RewardError: a setting cannot be restored.
    """
    watched = [(setting.name, setting.watch()) for setting in _SETTINGS]
    grad = torch.is_grad_enabled()
    changed: list[str] = []
    try:
        # leaving inference_mode and set_grad_enabled restores both modes, also after a reward that left them changed
        with own_random_state(seed, device), torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(grad)
            yield
            if torch.is_grad_enabled() != grad:
                changed.append("torch's gradient mode")
    finally:
        torch.set_grad_enabled(grad)
        for what, value in watched:
            if value.is_changed():
                try:
                    value.restore()
                except (OSError, RuntimeError, ValueError, TypeError) as error:
                    raise RewardError(f"reward function {name!r} changed {what}: {error}") from error
                changed.append(what)
        for what in dict.fromkeys(changed):
            _report(name, what)


@functools.lru_cache(maxsize=1024)  # once in a process: Python's own record is lost when filters change
def _report(name: str, what: str) -> None:
    warnings.warn(
        f"reward function {name!r} changed {what}; the change is undone after each call", RuntimeWarning, stacklevel=2
    )


class _Value(NamedTuple):
    """A setting at one moment."""

    is_changed: Callable[[], bool]
    restore: Callable[[], object]


class _Setting(NamedTuple):
    name: str
    watch: Callable[[], _Value]


def _setting(name: str, read: Callable[[], T], restore: Callable[[T], object]) -> _Setting:
    def watch() -> _Value:
        value = read()
        return _Value(lambda: read() != value, lambda: restore(value))

    return _Setting(name, watch)


def _attribute(owner: object, attribute: str, name: str) -> _Setting:
    return _setting(name, lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value))


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _is_closed(stream: str) -> bool:
    return bool(getattr(getattr(sys, stream), "closed", False))


def _cannot_open(closed: bool) -> None:
    raise ValueError(f"it is {'open' if closed else 'closed'} now, which cannot be undone: do not close it")


def _change_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name)]


_Handler = Callable[[int, FrameType | None], object] | int | None


def _handlers() -> list[_Handler]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _set_handlers(handlers: list[_Handler]) -> None:
    if threading.current_thread() is threading.main_thread():  # no other thread may set them
        for number, handler in zip(_SIGNALS, handlers, strict=True):
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)


def _alarm() -> bool:
    """Check whether an alarm is due."""
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _cancel_alarm(due: bool) -> None:
    if not due:  # an alarm that was due before and has fired cannot be restored
        signal.setitimer(signal.ITIMER_REAL, 0)


def _filters() -> list[object]:
    return list(warnings.filters)


def _set_filters(filters: list[object]) -> None:
    warnings.resetwarnings()  # also clears the decisions that Python has made with the changed filters
    assert isinstance(warnings.filters, list)
    warnings.filters[:] = filters


def _decimals() -> tuple[int, str, int, int]:
    context = decimal.getcontext()
    return context.prec, context.rounding, context.Emin, context.Emax


def _set_decimals(values: tuple[int, str, int, int]) -> None:
    context = decimal.getcontext()
    context.prec, context.rounding, context.Emin, context.Emax = values


_SMALL = [sys.float_info.min]  # a list: Python must not compute the product in advance


def _flushes_denormals() -> bool:
    return _SMALL[0] * 0.5 == 0.0


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None: no mode, as before any call


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class _Autocast(NamedTuple):
    states: dict[str, tuple[bool, torch.dtype]]
    cache: bool


def _autocast() -> _Autocast:
    states = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}
    return _Autocast(states, torch.is_autocast_cache_enabled())


def _set_autocast(before: _Autocast) -> None:
    for kind, (enabled, dtype) in before.states.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(before.cache)


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _current_gpu() -> tuple[int, torch.cuda.Stream] | None:
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device(), torch.cuda.current_stream()


def _set_current_gpu(current: tuple[int, torch.cuda.Stream] | None) -> None:
    if current is not None:
        torch.cuda.set_stream(current[1])
        torch.cuda.set_device(current[0])


_STREAMS = ("stdin", "stdout", "stderr")
_ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")
_CUDA, _CUDNN, _MKLDNN = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
_PRECISIONS = [torch.backends, _CUDA.matmul, _CUDNN, _MKLDNN]
_PRECISIONS += attrgetter("conv", "rnn")(_CUDNN) + attrgetter("matmul", "conv", "rnn")(_MKLDNN)  # stubs lack them

# in the order in which they are restored: general ones change more special ones
_SETTINGS = [
    _setting("the working directory", _folder, _change_folder),
    _setting("signal handlers", _handlers, _set_handlers),
    _setting("the alarm timer", _alarm, _cancel_alarm),
    *[_attribute(sys, stream, f"sys.{stream}") for stream in _STREAMS],
    *[_setting(f"sys.{stream}", functools.partial(_is_closed, stream), _cannot_open) for stream in _STREAMS],
    _setting("the filters of warnings", _filters, _set_filters),
    _setting("Python's recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _setting("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda x: locale.setlocale(locale.LC_ALL, x)),
    _setting("the decimal context", _decimals, _set_decimals),
    _setting("numpy's error handling", np.geterr, lambda values: np.seterr(**values)),
    _setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _setting("torch's default device", torch.get_default_device, _set_default_device),
    _setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    _setting("torch's flushing of denormal numbers", _flushes_denormals, torch.set_flush_denormal),
    _setting("torch's autocast", _autocast, _set_autocast),
    _setting("torch's anomaly detection", _anomaly, lambda x: torch.autograd.set_detect_anomaly(*x) and None),
    _setting(
        "torch's deterministic algorithms",
        _deterministic,
        lambda x: torch.use_deterministic_algorithms(x[0], warn_only=x[1]),
    ),
    _setting(
        "torch's float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    *[_attribute(owner, "fp32_precision", "torch's fp32 precision") for owner in _PRECISIONS],
    *[
        _attribute(_CUDA.matmul, f"allow_{kind}_reduced_precision_reduction", f"torch's {kind} reductions")
        for kind in ("fp16", "bf16")
    ],
    _attribute(_CUDA.matmul, "allow_fp16_accumulation", "torch's fp16 accumulation"),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory", "torch's filling of uninitialised memory"),
    *[_attribute(_MKLDNN, switch, f"mkldnn.{switch}") for switch in ("enabled", "deterministic")],
    *[_attribute(_CUDNN, switch, f"cudnn.{switch}") for switch in ("enabled", "benchmark", "deterministic")],
    *[
        _setting(
            f"torch's {kind} attention",
            getattr(_CUDA, f"{kind}_sdp_enabled"),
            getattr(_CUDA, f"enable_{kind}_sdp"),
        )
        for kind in _ATTENTIONS
    ],
    _setting("the current GPU or stream", _current_gpu, _set_current_gpu),
]
