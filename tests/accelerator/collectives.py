"""Collective operations of tensors on test devices, one process for each: by gloo, through the memory of the host.

NCCL itself is not shown. What is shown: which tensors DDP and FSDP2 exchange, that they are on the right device, and
that several processes compute what one does.
"""

import datetime
import itertools
import os
import pickle
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerator.registration import NAME, register
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.futures import Future

BACKEND = "host"


def _finished(result: Any) -> dist.Work:
    future: Future = Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)


class HostGroup(dist.ProcessGroup):
    """Runs each operation on copies in the CPU's memory and returns when it is done."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore(BACKEND, store), rank, size, timeout)

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def getBackendName(self) -> str:
        return BACKEND

    def _on_copies(self, operation: Callable[[list[Tensor]], dist.Work], tensors: list[Tensor]) -> dist.Work:
        copies = [x.cpu() for x in tensors]
        operation(copies).wait()
        for x, copy in zip(tensors, copies, strict=True):
            x.copy_(copy)
        return _finished(tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceOptions()
        return self._on_copies(lambda copies: self.gloo.allreduce(copies, opts), tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        return self._on_copies(lambda copies: self.gloo.broadcast(copies, opts), tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        (parts,), (mine,) = outputs, inputs
        return self._on_copies(lambda copies: self.gloo.allgather([copies], [mine.cpu()]), parts)

    def _allgather_base(self, output: Tensor, mine: Tensor, opts: Any = None) -> dist.Work:
        self._on_copies(lambda copies: self.gloo._allgather_base(copies[0], mine.cpu()), [output])
        return _finished(output)

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, opts: Any) -> dist.Work:
        self._on_copies(lambda copies: self.gloo._reduce_scatter_base(copies[0], whole.cpu(), opts), [output])
        return _finished(output)

    all_gather_single = _allgather_base  # their names since PyTorch 2.13
    reduce_scatter_single = _reduce_scatter_base

    def barrier(self, opts: Any = None) -> dist.Work:
        return self.gloo.barrier()


def _move_by_swapping(parameters: Iterable[Tensor], buffers: Iterable[Tensor], device: torch.device) -> None:
    """What FSDP2 does with `.data`, which a tensor of the CPU cannot take from a device like this one."""
    for x in itertools.chain(parameters, buffers):
        if x.device not in (device, torch.device("meta")):
            moved = x.detach().to(device)
            is_parameter = isinstance(x, nn.Parameter)
            torch.utils.swap_tensors(x, nn.Parameter(moved, x.requires_grad) if is_parameter else moved)


def join(rank: int, size: int, store: Path) -> torch.device:
    """Make this process one of several, as torchrun and its own test device do."""
    register()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _fsdp_init._move_states_to_device = _move_by_swapping
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
    torch.testgpu.set_device(rank)
    dist.Backend.register_backend(BACKEND, HostGroup, devices=["cpu", NAME])
    dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=size)
    return torch.device(NAME, rank)


def run_child(rank: int, size: int, store: Path, function: Callable[[torch.device], Any]) -> None:
    """The body of a process: writes `function(device)`, or the traceback, beside the store."""
    torch.set_num_threads(1)
    failure, result = "", None
    try:
        result = function(join(rank, size, store))
    except Exception:  # the parent shows it
        failure = traceback.format_exc()
    Path(f"{store}.{rank}").write_bytes(pickle.dumps((failure, result)))
    if dist.is_initialized():
        dist.destroy_process_group()
