"""Tensors whose memory may be read by address, without PyTorch's dispatcher.

A compiled loop or a Triton kernel receives an address, a shape and strides. They describe the whole tensor only if it
is plain. A fake or distributed tensor has no memory here, a negated view has a pending sign, a tensor of torch.func
represents several, and a value that a tracer does not record becomes a constant of its graph. PyTorch's operations
compute whatever is not plain.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Key = torch._C.DispatchKey
_keys = torch._C._dispatch_keys
_modes = torch._C._len_torch_dispatch_stack
jit_tracer = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRANSFORMS = {
    _Key.FuncTorchBatched: "vmap",
    _Key.FuncTorchGradWrapper: "grad, vjp or jvp",
    _Key.Functionalize: "functionalize",
}
_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FUNCTIONAL", "FAKE"))


def addressable(first: Tensor, *others: Tensor | None) -> bool:
    """Return whether the memory of all tensors may be read by address: plain, strided, on the CPU, and not traced.

    False in every dispatch mode: a mode that only records would miss what is read and written by address.
    """
    if not first.is_cpu or torch.compiler.is_compiling() or _modes() or jit_tracer() is not None:
        return False
    for x in (first, *others):
        if x is None:
            continue
        if type(x) not in PLAIN_TYPES or not x.is_cpu or x.is_neg() or x.is_conj():
            return False
        try:
            if x.data_ptr() == 0 and x.numel():  # efficient zeros, tensors of functionalize, freed memory
                return False
        except RuntimeError:  # other layouts, tensors of torch.func
            return False
    return True


def traced(*tensors: Tensor | None) -> bool:
    """Return whether make_fx, FakeTensorMode or a tensor's own dispatch records or replace what is computed."""
    if torch.compiler.is_compiling():
        return False
    if _modes() and any(torch._C._get_dispatch_mode(key) for key in _TRACERS):
        return True
    return any(x is not None and type(x) not in PLAIN_TYPES and _keys(x).has(_Key.Python) for x in tensors)


def readable(x: Tensor) -> bool:
    """Return whether Python may read values: without waiting for a device or making them constants of a graph."""
    return x.is_cpu and not torch.compiler.is_compiling() and jit_tracer() is None and not traced(x)


def refuse_transformed(operation: str, argument: str, x: Tensor) -> None:
    """Raise NotImplementedError for tensors of torch.func and for tensors with a tangent."""
    keys = _keys(x)
    for key, transform in _TRANSFORMS.items():
        if keys.has(key):
            raise NotImplementedError(
                f"{operation}: {argument} is a tensor of torch.func ({transform}), which is not supported: call it"
                " outside the transform, or use ppo_fast.kernels.reference"
            )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{operation}: {argument} has a tangent, and forward-mode AD is not supported: call backward, or use"
            " ppo_fast.kernels.reference"
        )


def refuse_distributed(operation: str, argument: str, x: object) -> None:
    """Raise TypeError for a DTensor."""
    placements = getattr(x, "placements", None)
    if placements is not None:
        sharded = any(p.is_shard() for p in placements)
        kind = "vocabulary-parallel or otherwise sharded" if sharded and argument == "weight" else "distributed"
        raise TypeError(
            f"{operation}: {argument} is a {kind} DTensor with placements {tuple(placements)}, but must be a plain"
            f" tensor: call it in the forward of the FSDP2-wrapped module, where parameters are unsharded, or pass"
            f" {argument}.full_tensor()"
        )


def required(x: Tensor | None) -> Tensor:
    """Return a tensor that ppo_fast.ops has checked to be given."""
    if x is None:
        raise TypeError("a tensor that this operation needs is None")
    return x


def plain(x: Tensor) -> Tensor:
    """x with its pending sign and efficient zeros written out, and without a subclass that only adds a name."""
    override, plain_one = (getattr(kind.__torch_function__, "__func__", None) for kind in (type(x), Tensor))
    if override is plain_one and not _keys(x).has(_Key.Python):
        x = x.as_subclass(Tensor)
    return x.clone() if x._is_zerotensor() else x.resolve_neg()
