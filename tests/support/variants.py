"""The variants of all kernels: those that the launchers list, and those of real launches."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

from ptx.emulator import ARCHITECTURES, Emulator, Launch, compile_launch
from support import random_calls
from triton.backends.compiler import GPUTarget

from ppo_fast.kernels.common.launch import Variant

KERNELS = Path(__file__).parents[2] / "kernels"
CALLS = 5000  # random calls that are captured


class Found(NamedTuple):
    """A variant that calls launched."""

    launch: Launch
    call: int  # number of the quickest call that launched it
    operation: str


def modules() -> list[str]:
    """Modules of kernels/ that define variants(), as dotted names below ppo_fast.kernels."""
    files = sorted(KERNELS.rglob("*.py"))
    found = [f for f in files if re.search(r"^def variants\(", f.read_text(encoding="utf-8"), re.MULTILINE)]
    return [".".join(f.relative_to(KERNELS).with_suffix("").parts) for f in found]


def listed(threads_per_warp: int = 32) -> dict[Any, Variant]:
    """Every variant of every launcher, by its key, for GPUs of NVIDIA (32) or AMD (64)."""
    found: dict[Any, Variant] = {}
    for module in modules():
        variants = importlib.import_module(f"ppo_fast.kernels.{module}").variants
        # The launches of some modules do not depend on the vendor.
        for variant in variants(threads_per_warp) if inspect.signature(variants).parameters else variants():
            assert key(variant) not in found, f"{variant.name} and {found[key(variant)].name} are the same variant"
            found[key(variant)] = variant
    return found


def key(x: Variant | Launch) -> Any:
    """The key of the compiled code. Triton 3.6 calls the type of a bool tensor *i1, later versions *u1."""
    constexprs, options = dict(x.constexprs), dict(x.options)
    types = tuple((name, kind.replace("*i1", "*u1")) for name, kind in dict(x.types).items())
    return x.kernel.__name__, types, tuple(sorted(constexprs.items())), tuple(sorted(options.items()))


def captured(calls: int = CALLS) -> dict[Any, Found]:
    """Every variant that random calls launch. Nothing is compiled or run."""
    emulator, found = Emulator(), {}
    emulator.runs = False
    with emulator.installed():
        for number in range(calls):
            before = set(emulator.launches)
            operation, call = random_calls.make_call(number)
            call("triton")
            random_calls.make_call.cache_clear()
            for launch in set(emulator.launches) - before:
                found[key(launch)] = Found(launch, number, operation)
    return found


def name(x: Variant | Launch) -> str:
    """A short name for tables: the kernel and what is not common to all of its variants."""
    dtypes = sorted({kind[1:] for _, kind in dict(x.types).items() if kind in ("*fp32", "*bf16", "*fp16")} - {"fp32"})
    flags = [f"{k}={v}" for k, v in sorted(dict(x.constexprs).items())]
    return " ".join([x.kernel.__name__.strip("_"), *(dtypes or ["fp32"]), *flags])


def compile_for(x: Variant | Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a variant: asm["ttir"], asm["ptx"], asm["cubin"]; for AMD asm["amdgcn"]."""
    launch = x
    if isinstance(x, Variant):
        constexprs, options = (tuple(sorted(values.items())) for values in (x.constexprs, x.options))
        launch = Launch(x.kernel, tuple(x.types.items()), constexprs, (), options)
    return compile_launch(launch, target)


def compiled(x: Variant | Launch, architecture: str = "sm_90") -> Any:
    """The same for an NVIDIA GPU."""
    return compile_for(x, GPUTarget("cuda", ARCHITECTURES[architecture], 32))
