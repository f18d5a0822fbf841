"""Which attention runs on packed rows: flash-attn 3 or 2, PyTorch's variable-length attention, or SDPA by buckets.

`decide` is the only function that decides this. Every layer of a run calls it, `models.probe` calls it at load, and
`doctor` prints its decisions. A fast path is used only after a trial (`flash_calls.trial`); after a failed trial the
next path is tried.

FlashAttention: Dao et al. 2022 (arXiv 2205.14135), Dao 2023 (2307.08691), Shah et al. 2024 (2407.08608).
"""

import importlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ppo_fast.common import device as devices
from ppo_fast.common.text import first_line
from ppo_fast.llm.packing.flash_calls import CALLS, Attention, Request, Rows, trial

HALF = (torch.float16, torch.bfloat16)
BUCKETS = "buckets"
BUCKETS_LABEL = "PyTorch's SDPA by buckets"
MAX_HEAD_SIZE = 256  # of flash-attn 2 and 3, and of the copy in PyTorch
# a library that was built for another PyTorch or CUDA raises any of them
LOADING_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class Decision:
    """The path that a request takes."""

    path: str  # "flash-attn 3", "flash-attn 2", "torch varlen" or "buckets"
    label: str  # with the version, for people
    reason: str | None = None  # why no faster path is taken
    unexpected: bool = False  # an installed package cannot be used

    def message(self, request: Request) -> str | None:
        """What a run must say of it; None if there is nothing to say."""
        on_gpu = request.device.type != "cpu" or devices.compute_capability(request.device) is not None
        if self.reason is None or not on_gpu or request.dtype not in HALF:
            return None
        if self.path == BUCKETS:
            return f"attention runs through {self.label}, which is slower than FlashAttention: {self.reason}"
        return f"{self.reason}; attention runs through {self.label} instead" if self.unexpected else None


@dataclass
class _Findings:
    """What is known of the installed packages and this machine's devices, as compiled kernels are: per process."""

    decisions: dict[tuple[Request, tuple[int, int] | None, bool, bool], Decision] = field(default_factory=dict)
    rejected: dict[tuple[str, Request, bool], str | None] = field(default_factory=dict)  # None: the trial succeeded
    packages: dict[str, "_Package"] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    buckets_only: bool = False


_found = _Findings()


def reset() -> None:
    """Clear all results: a run prints its warnings once, and examines the installed packages again."""
    for known in (_found.decisions, _found.rejected, _found.packages, _found.said):
        known.clear()


def warn_once(message: str, key: str | None = None) -> None:
    """Warn unless this run has already warned of the same (of `key`, if the message has varying figures)."""
    if (key or message) not in _found.said:
        _found.said.add(key or message)
        warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class _Package:
    """An installed implementation: its function, or why there is none."""

    label: str
    function: Attention | None = None
    version: tuple[int, ...] = ()
    problem: str | None = None
    broken: bool = False  # it is installed, but cannot be used

    def attention(self) -> Attention:
        """The function of a package without a problem."""
        assert self.function is not None  # `_why_not` excludes a package without one
        return self.function


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 7, 4) of "2.7.4.post1"."""
    end = len(text) - len(text.lstrip("0123456789."))
    return tuple(int(x) for x in text[:end].split(".") if x)


def _package(name: str, distribution: str, module: str) -> _Package:
    """Import `flash_attn_varlen_func` of an installed distribution, once."""
    if name in _found.packages:
        return _found.packages[name]
    try:
        # flash-attn 4 installs a folder flash_attn as well, so the module's presence does not tell the distribution
        installed = version(distribution)
    except PackageNotFoundError:
        package = _Package(name, problem=f"{name} is not installed")
    else:
        label = f"{distribution} {installed}".replace("_", "-")
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
            package = _Package(label, function, _numbers(installed))
        except LOADING_ERRORS as error:
            text = f"{label} cannot be imported ({first_line(error)}): reinstall it for PyTorch {torch.__version__}"
            package = _Package(label, problem=f"{text}, or remove it", broken=True)
    _found.packages[name] = package
    return package


def _flash_attn_3() -> _Package:
    return _package("flash-attn 3", "flash_attn_3", "flash_attn_interface")


def _flash_attn_2() -> _Package:
    return _package("flash-attn", "flash_attn", "flash_attn")


def _torch_varlen() -> _Package:
    label = f"torch.nn.attention.varlen of PyTorch {torch.__version__}"
    try:
        return _Package(label, importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    except LOADING_ERRORS as error:
        return _Package(label, problem=f"PyTorch has no torch.nn.attention.varlen ({first_line(error)})")


# the fastest first
_PACKAGES = {"flash-attn 3": _flash_attn_3, "flash-attn 2": _flash_attn_2, "torch varlen": _torch_varlen}


def _why_none(request: Request, capability: tuple[int, int] | None) -> str | None:
    """Why no fast path can take the request, whatever is installed."""
    if request.dtype not in HALF:
        return f"FlashAttention needs float16 or bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if capability is None:
        return f"FlashAttention needs an NVIDIA GPU, which {request.device} is not"
    if capability < (8, 0):
        return f"FlashAttention needs compute capability 8.0, and {request.device} has {capability[0]}.{capability[1]}"
    if request.sinks:
        return "FlashAttention has no attention sinks"
    size, value_size = request.head_size, request.value_size
    if size != value_size:
        return f"FlashAttention needs one head size, not {size} for keys and {value_size} for values"
    if size > MAX_HEAD_SIZE or size % 8:
        return f"FlashAttention needs a head size that is a multiple of 8 up to {MAX_HEAD_SIZE}, not {size}"
    return None


def _why_not(path: str, package: _Package, request: Request) -> str | None:
    """Why this implementation cannot take the request, without a trial."""
    if package.problem is not None:
        return package.problem
    if path == "flash-attn 2" and package.version < (2, 4, 1):
        return f"{package.label} is older than 2.4.1"
    if path == "flash-attn 2" and request.softcap and package.version < (2, 6):
        return f"a softcap needs flash-attn 2.6, and {package.label} is older"
    if path == "torch varlen" and request.softcap:
        return "torch.nn.attention.varlen has no softcap"
    return None


def decide(request: Request) -> Decision:
    """The fastest path that takes the request, and why a faster one does not."""
    capability = devices.compute_capability(request.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (request, capability, deterministic, _found.buckets_only)
    if key not in _found.decisions:
        _found.decisions[key] = _decide(request, capability, deterministic)
    return _found.decisions[key]


def decide_and_warn(request: Request) -> Decision:
    """The same for a run, which says once what a user should know of it."""
    decision = decide(request)
    message = decision.message(request)
    if message is not None:
        warn_once(message)
    return decision


def _decide(request: Request, capability: tuple[int, int] | None, deterministic: bool) -> Decision:
    reason = _why_none(request, capability)
    if capability is None or reason is not None or _found.buckets_only:
        return Decision(BUCKETS, BUCKETS_LABEL, reason)
    reasons: list[str] = []
    unexpected = False
    for path, find in _PACKAGES.items():
        if path == "flash-attn 3" and capability != (9, 0):
            reasons.append(f"flash-attn 3 needs compute capability 9.0, not {capability[0]}.{capability[1]}")
            continue
        package = find()
        reason = _why_not(path, package, request)
        unexpected = unexpected or package.broken
        if reason is None:
            reason = _trial_result(path, package, request, deterministic)
            if reason is None:
                return Decision(path, package.label, "; ".join(reasons) or None, unexpected)
            unexpected = True
        reasons.append(reason)
    return Decision(BUCKETS, BUCKETS_LABEL, "; ".join(reasons), unexpected)


def _trial_result(path: str, package: _Package, request: Request, deterministic: bool) -> str | None:
    """Why the implementation fails here; None if it works. Each trial runs once."""
    key = (path, request, deterministic)
    if key not in _found.rejected:
        # a new thread has no autocast, no_grad or hooks of saved tensors, unlike the layer that asks
        with ThreadPoolExecutor(1) as thread:
            problem = thread.submit(_try, path, package.attention(), request).result()
        where = f"for head size {request.head_size} in {str(request.dtype).removeprefix('torch.')} on {request.device}"
        _found.rejected[key] = None if problem is None else f"{package.label} cannot be used {where} ({problem})"
    return _found.rejected[key]


def _try(path: str, function: Attention, request: Request) -> str | None:
    with devices.made_current(request.device):  # that of a new thread is the first
        return trial(path, function, request)


def clear_decisions() -> None:
    """Clear the decisions; results of trials remain."""
    _found.decisions.clear()


def requests() -> list[Request]:
    """What was asked for since `clear_decisions`."""
    return list({key[0]: None for key in _found.decisions})


def reject(problem: str) -> bool:
    """Take back the decisions for a fast path since `clear_decisions`; False if there are none."""
    fast = {key: made for key, made in _found.decisions.items() if made.path != BUCKETS}
    for (request, _, deterministic, _), made in fast.items():
        _found.rejected[made.path, request, deterministic] = f"{made.label} cannot be used ({problem})"
    clear_decisions()
    return bool(fast)


@contextmanager
def buckets_only() -> Iterator[None]:
    """Every decision is for buckets inside this block: for comparison."""
    before, _found.buckets_only = _found.buckets_only, True
    try:
        yield
    finally:
        _found.buckets_only = before


def attend(decision: Decision, rows: Rows) -> Tensor:
    """[total, H, d]: causal attention by the implementation that was decided on."""
    return CALLS[decision.path](_PACKAGES[decision.path]().attention(), rows)
