"""Models and tensors in several processes: DDP, FSDP2, loading, and whole tensors from shards and back.

DistributedDataParallel keeps a model in each process; FSDP2 (`fully_shard`) keeps a part of each weight, gradient and
optimizer state. The loss is computed inside the forward of the wrapped module. Under FSDP2 only the main process needs
whole weights at the start: models of the others may be on the meta device, and `shard` sends them their parts.

`torch.distributed.checkpoint.state_dict` is not used: it takes twice the time, keeps tied weights twice, and gives an
optimizer that has not stepped a step count of 1 (bench/results/cpu-2core/state_dicts).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.llm.distributed import Distributed
from ppo_fast.llm.models.modes import autocast_dtype

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# a model's own code raises any of them where it cannot be built on the meta device
BUILDING_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError)


def _without_buffers() -> dict[str, bool]:
    """The argument of DDP for a forward that sends no buffers; torch 2.13 has renamed it."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


def wrap(policy: nn.Module, distributed: Distributed, *, dtype: str, unused_parameters: bool) -> None:
    """Wrap the policy in DDP or FSDP2; collective. Then `distributed.wrapped_module` is called instead of it.

    Args:
        policy: a module whose forward returns the loss.
        distributed: the processes of the run.
        dtype: of the layers that FSDP2 gathers.
        unused_parameters: whether a backward may leave trained parameters without a gradient.
    """
    if distributed.strategy == "ddp":
        make: Callable[..., DistributedDataParallel] = DistributedDataParallel  # its arguments depend on the version
        distributed.wrapped = make(
            policy,
            find_unused_parameters=unused_parameters,
            gradient_as_bucket_view=True,  # else the buckets are a second copy of all gradients
            **_without_buffers(),
        )
    if distributed.strategy == "fsdp":
        shard(policy, distributed, dtype)
        for method in ("evaluate", "adapter_logprobs", "generate"):
            register_fsdp_forward_method(policy, method)


class TensorLayout(NamedTuple):
    """A parameter or buffer without its values."""

    name: str
    owner: str  # the first name of a tied one
    shape: tuple[int, ...]
    dtype: torch.dtype


def parameter_layout(model: nn.Module) -> list[TensorLayout]:
    """The layouts of all parameters and buffers, also of tied ones."""
    first: dict[Tensor, str] = {}
    parameters = [(n, first.setdefault(p, n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    buffers = [(n, n, b) for n, b in model.named_buffers(remove_duplicate=False)]
    return [TensorLayout(name, owner, tuple(x.shape), x.dtype) for name, owner, x in (*parameters, *buffers)]


def load_on_main(distributed: Distributed, load: Callable[[bool], tuple[M, T]]) -> tuple[M, T]:
    """Load a model, in each process or, under FSDP2, with weights in the first process alone.

    `load(weights)` gives the model and what belongs to it. What a configuration does not describe, such as quantised
    weights and adapters in the folder, makes the first model differ from those without weights: then each
    process loads it whole.

    Raises:
        UserError: the first process cannot load it. All raise this.
    """
    if distributed.strategy != "fsdp" or distributed.size == 1:
        return load(True)
    loaded: tuple[M, T] | None = None
    found: list[TensorLayout] | Exception | None = None
    try:
        loaded = load(distributed.is_main)
        found = parameter_layout(loaded[0])
    except (UserError, *BUILDING_ERRORS) as error:
        if distributed.is_main and not isinstance(error, UserError):
            raise
        found = error if distributed.is_main else None
    layouts = distributed.all_gather_object(found)
    if isinstance(layouts[0], UserError):
        raise layouts[0]
    if loaded is None or (not distributed.is_main and any(x != layouts[0] for x in layouts)):
        return load(True)
    return loaded


def shard(model: nn.Module, distributed: Distributed, dtype: str) -> None:
    """FSDP2 over all processes: each layer is gathered when it is needed, everything else with the whole module.

    In bfloat16 and float16 the layers are gathered in it, and gradients are summed in fp32. Autocast alone would gather
    them in fp32 and keep its copies until backward, so that each process would hold the whole model.

    Where any process has a model without weights, all get the first one's.
    """
    sent = distributed.any_rank(not has_weights(model))
    if sent:
        _check_layouts(model, distributed)
    # detached: fully_shard puts the parts in the parameters, and these keep the whole
    whole = {name: p.detach() for name, p in model.named_parameters()} if sent and distributed.is_main else {}
    mesh = init_device_mesh(distributed.device.type, (distributed.size,))
    half = autocast_dtype(dtype)
    precision = MixedPrecisionPolicy()
    if half is not None:
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh)  # embeddings, norms and heads stay in fp32, as with DDP
    if sent:
        _send(model, distributed, whole)


def _check_layouts(model: nn.Module, distributed: Distributed) -> None:
    """Reject models that differ between processes, which would wait for each other or exchange wrong weights."""
    layouts = distributed.all_gather_object(parameter_layout(model))
    for rank, theirs in enumerate(layouts):
        if theirs != layouts[0]:
            odd = sorted({x.name for x in {*theirs} ^ {*layouts[0]}})
            raise UserError(
                f"the model of rank {rank} differs from that of rank 0 in {', '.join(odd[:1]) or 'its order'}: build it"
                " from the same configuration"
            )


@torch.no_grad()
def _send(model: nn.Module, distributed: Distributed, whole: dict[str, Tensor]) -> None:
    """Send each process its part of a sharded model's weights, and all buffers, from the main process.

    `whole` holds the first one's weights; it is emptied, so that each is freed when it has been sent.
    """
    if not distributed.is_main:
        model.to_empty(device=distributed.device)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        part = p.to_local()
        rows = -(-p.shape[0] // distributed.size)  # of each part but the last ones, which may be shorter or empty
        mine = part.new_empty(rows, *p.shape[1:])
        parts = None
        if distributed.is_main:
            padded = part.new_zeros(distributed.size, rows, *p.shape[1:])
            padded.flatten(0, 1)[: p.shape[0]] = whole.pop(name)
            parts = list(padded)
        dist.scatter(mine, parts, src=0)
        part.copy_(mine[: part.shape[0]])
    for b in model.buffers():
        sent = b.contiguous()
        dist.broadcast(sent, src=0)
        if not distributed.is_main:
            b.copy_(sent)


def to_full_tensor(x: Tensor) -> Tensor:
    """A whole tensor from its shards; collective. One that is whole stays as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor) -> Tensor:
    """This process's shard of a tensor, which shares its memory; a whole tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def reshard(model: nn.Module) -> None:
    """Free gathered weights of a module under FSDP2, so that its parameters are their shards: a pass without a backward
    leaves those of the whole module gathered. Nothing in one process."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather_to_main(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the CPU in the first process, and nothing in the others; collective.

    A sharded tensor is gathered on the first process's device, one at a time: no other one has room for it.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, x in tensors:
        if isinstance(x, DTensor):
            whole = _gathered(x)
        else:
            whole = x.cpu() if first else None
        if whole is not None:
            found[name] = whole
    return found


def _gathered(x: DTensor) -> Tensor | None:
    """A tensor that is sharded by rows, on the CPU, in the first process; None in the others."""
    part, size = x.to_local(), dist.get_world_size()
    rows = -(-x.shape[0] // size)  # of each part but the last ones, which may be shorter or empty
    padded = part.new_zeros(rows, *x.shape[1:])
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.cat([p.cpu() for p in parts])[: x.shape[0]]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, on the CPU of the first process; empty in others; collective. Tied weights
    stay one tensor."""
    state = model.state_dict(keep_vars=True)
    owners: dict[Tensor, str] = {}
    for name, x in state.items():
        owners.setdefault(x, name)
    found = gather_to_main((name, x.detach()) for x, name in owners.items())
    return {name: found[owners[x]] for name, x in state.items()} if found else {}


@contextmanager
def keep_gathered(model: nn.Module) -> Iterator[None]:
    """Under FSDP2 the layers that are gathered inside this block stay so until its end."""
    layers = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    for layer in layers:
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def copy_from_full(target: Tensor, source: Tensor) -> None:
    """Write a whole tensor to a whole or sharded one; collective."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def shard_like(target: Tensor, source: Tensor) -> Tensor:
    """A whole tensor, laid out as `target` is; collective."""
    made = torch.empty_like(target, dtype=source.dtype, requires_grad=False)
    copy_from_full(made, source)
    return made
