"""Several processes under torchrun: who does what, and how what they found becomes one.

Each process answers its share of a step's prompts and judges them. Then all exchange their answers, and from there on
they agree on everything: advantages, whitening, statistics and the order of minibatches are computed from the whole
rollout by each of them. A minibatch's packs are dealt out, so that the gradient, summed over processes, is that of one
process on the joined batch.

DistributedDataParallel keeps a model in each process; FSDP2 (`fully_shard`) keeps a part of each weight, gradient and
optimizer state. The loss is computed inside the wrapped module's forward. Under FSDP2 only the first process needs
whole weights at the start: models of the others may be on the meta device, and `shard` sends them their parts.
"""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_fast.common.device import has_weights, pick_device
from ppo_fast.common.errors import UserError
from ppo_fast.common.launched import address, local_rank, process_count, this_rank
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.meeting import Meeting
from ppo_fast.llm.packing.rollout import CPU, Rollout, join_rollouts, join_scores

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# in the error of a collective operation that waited for a process that is gone, or too long for a slow one
LOST = ("closed by peer", "reset by peer", "broken pipe", "got 0 bytes", "ncclremoteerror", "communicator was aborted")
TIMED_OUT = ("timed out", "timeout", "timing out")
# a model's own code raises any of them where it cannot be built on the meta device
BUILDING_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(eq=False)
class Distributed:
    """The processes of a run; one alone, if torchrun did not start it."""

    rank: int
    size: int
    strategy: str  # one, ddp or fsdp
    device: torch.device
    wrapped: nn.Module | None = None  # the policy, ready to be called in several processes
    meeting: Meeting | None = None  # None: this process is alone

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def local_rows(self, rows: Sequence[T]) -> list[T]:
        """This process's rows: a stretch of them, at most one longer than another's."""
        ends = [len(rows) * r // self.size for r in (self.rank, self.rank + 1)]
        return list(rows[ends[0] : ends[1]])

    def assign_packs(self, packs: Sequence[T]) -> list[T | None]:
        """This process's packs, as many for each process: None where there is nothing left to do."""
        rounds = -(-len(packs) // self.size)
        mine = list(packs[self.rank :: self.size])
        return [*mine, *[None] * (rounds - len(mine))]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce_max(torch.tensor(float(flag), device=self.device)))

    def rendezvous(self, where: str, *, signal: str = "") -> str:
        """Waits for all processes, which have done what `where` says, and returns a signal that one of them brought.

        Raises:
            UserError: a process failed, or is later than config.process_timeout; the message names it.
        """
        return signal if self.meeting is None else self.meeting(where, signal=signal)

    def all_gather_object(self, x: T) -> list[T]:
        """Every process's object, by rank."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def check_equal(self, parts: dict[str, Any]) -> None:
        """Compares what all processes must share, by name. A part that a process does not give is not compared there.

        Raises:
            UserError: a part differs; the message names it and the processes.
        """
        everywhere = self.all_gather_object(parts)
        for name in dict.fromkeys(name for theirs in everywhere for name in theirs):
            (first, expected), *others = ((rank, x[name]) for rank, x in enumerate(everywhere) if name in x)
            odd = next(((rank, x) for rank, x in others if x != expected), None)
            if odd is not None:
                raise UserError(
                    f"the processes do not agree on {name}: it is {expected} in rank {first} and {odd[1]} in rank"
                    f" {odd[0]}; all must start with the same options, data and weights, and differ in nothing else"
                )

    def barrier(self) -> None:
        """Waits for the others."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, function: Callable[[], T]) -> T:
        """What the function returns, or the UserError that it raises, in the first process: the same in all."""
        if self.size == 1:
            return function()
        found: T | UserError | None = None
        if self.is_main:
            try:
                found = function()
            except UserError as error:
                found = error
        answer: Any = self.all_gather_object(found)[0]
        if isinstance(answer, UserError):
            raise answer
        return answer

    def run_with_weights(self, function: Callable[[], T], *, of: nn.Module) -> T:
        """What the function finds out about the model; collective under FSDP2.

        It is called in the first process alone if another one has no weights of the model.
        """
        alone = self.strategy == "fsdp" and self.any_rank(not has_weights(of))
        return self.run_on_main(function) if alone else function()

    def gather_rollout(self, rollout: Rollout, scores: Tensor, pad: int) -> tuple[Rollout, Tensor]:
        """All processes' answers and their scores, in the order of the prompts."""
        if self.size == 1:
            return rollout, scores
        found = self.all_gather_object((rollout.to(CPU), scores.cpu()))
        parts, theirs = [part for part, _ in found], [some for _, some in found]
        return join_rollouts(parts, pad).to(self.device), join_scores(parts, theirs).to(self.device)

    def reduce_metrics(self, metrics: dict[str, float], count: int) -> dict[str, float]:
        """Metrics over all processes' answers from each one's, with the number of its answers.

        What counts (`reward_failed/NAME`) is summed, and of means the mean is taken.
        """
        found = self.all_gather_object((metrics, count))
        total = sum(n for _, n in found)
        return {
            name: sum(m[name] for m, _ in found)
            if name.startswith("reward_failed/")
            else sum(m[name] * n for m, n in found) / total
            for name in metrics
        }

    def max_over_ranks(self, seconds: dict[str, float]) -> dict[str, float]:
        """The largest of each figure over processes, as of times: all wait for the slowest process."""
        found = self.all_gather_object(seconds)
        return {name: max(theirs[name] for theirs in found) for name in seconds}

    def wrap(self, policy: nn.Module, *, dtype: str, unused_parameters: bool) -> None:
        """Makes the policy one of several. Collective; after it `module` is to be called, and `full` shows weights."""
        if self.strategy == "ddp":
            self.wrapped = DistributedDataParallel(
                policy,
                find_unused_parameters=unused_parameters,
                gradient_as_bucket_view=True,  # else the buckets are a second copy of all gradients
                **_without_buffers(),
            )
        if self.strategy == "fsdp":
            shard(policy, self, dtype)
            for method in ("evaluate", "adapter_logprobs", "generate"):
                register_fsdp_forward_method(policy, method)

    def wrapped_module(self, policy: nn.Module) -> nn.Module:
        """What to call instead of the policy."""
        return self.wrapped or policy

    def sync_gradients(self, last: bool) -> AbstractContextManager:
        """DDP adds gradients up over processes in the backward of the last micro-batch only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()


SINGLE_PROCESS = Distributed(0, 1, "one", torch.device("cpu"))

_meetings: list[Meeting] = []  # of this process; the last one belongs to the newest process group


def _without_buffers() -> dict[str, Any]:
    """The argument of DDP for a forward that sends no buffers; torch 2.13 has renamed it."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


def _meeting(rank: int, size: int, limit: float) -> Meeting:
    store = dist.distributed_c10d._get_default_store()
    if not _meetings or _meetings[-1].store is not store:
        _meetings.append(Meeting(store, rank, size, limit))
    _meetings[-1].limit = limit
    return _meetings[-1]


def init_distributed(config: PPOConfig) -> Distributed:
    """The distributed that torchrun announces in the environment, joined; or this process alone.

    Raises:
        UserError: config.parallel asks for several processes, but torchrun did not start this one; or the processes
            have different options.
    """
    size = process_count()
    if size == 1:
        if config.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
            raise UserError("parallel = fsdp needs torchrun: torchrun --nproc-per-node GPUS -m ppo_fast.cli train ...")
        if config.parallel != "fsdp":
            return Distributed(0, 1, "one", pick_device(config.device, config.backend, config.dtype))  # type: ignore[arg-type]
    rank, device = this_rank(size), _device_of_rank(config)
    if not dist.is_initialized():
        _join(device, config.process_timeout)
    kind = "ddp" if config.parallel == "auto" else config.parallel
    distributed = Distributed(rank, size, kind, device, meeting=_meeting(rank, size, config.process_timeout))
    distributed.check_equal(_shared_options(config))  # first: they decide which collective operations follow
    if config.prompts_per_step < size:
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step} is less than the {size} processes, each of which answers"
            " some of them"
        )
    return distributed


def _shared_options(config: PPOConfig) -> dict[str, Any]:
    """The options that are the same in all processes: all but `quiet` and the path of `out`."""
    options = dataclasses.asdict(config) | {"out": "a folder" if config.out is not None else None}
    return {name: x for name, x in options.items() if name != "quiet"}


def _join(device: torch.device, limit: float) -> None:
    """Joins the process group that the environment describes; UserError if the other processes do not within `limit`
    seconds."""
    timeout = timedelta(seconds=limit)
    try:
        if device.type == "cuda":  # device_id: else a barrier guesses the GPU from the rank
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        raise UserError(
            f"the processes did not meet at {address()} (MASTER_ADDR and MASTER_PORT) within {limit:g} s"
            f" ({str(error).splitlines()[0]}): start all WORLD_SIZE = {os.environ['WORLD_SIZE']} of them with torchrun"
        ) from error


def _device_of_rank(config: PPOConfig) -> torch.device:
    """The GPU of this process's LOCAL_RANK, which becomes the current one; or the CPU."""
    local = local_rank()
    name = config.device
    if name.startswith("cuda:"):
        raise UserError(f"device = {name}, but under torchrun each process has a GPU of its own; use --device cuda")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{local}"
        if 0 < torch.cuda.device_count() <= local:
            raise UserError(
                f"LOCAL_RANK = {local}, but this machine has {torch.cuda.device_count()} GPUs: start as many processes"
                " with --nproc-per-node"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(local)  # before anything else: else each process would hold memory of the first GPU
    return pick_device(name, config.backend, config.dtype)  # type: ignore[arg-type]


def peer_failure(error: RuntimeError) -> str:
    """Which processes a failed collective operation waited for, in a sentence; "" after any other error."""
    text = str(error).lower()
    collective = dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in text)
    if not collective or not any(part in text for part in (*LOST, *TIMED_OUT)):
        return ""
    missing = ""
    with suppress(RuntimeError):  # the store is gone, too
        try:
            missing = _meetings[-1].lost() if _meetings else ""
        except UserError as told:
            return str(told)
    late = any(part in text for part in TIMED_OUT)
    reason = "took longer than process_timeout" if late else "has ended; its own message, if it left one, says why"
    return f"{missing or 'another process'} {reason}"


def shutdown(status: int) -> None:
    """Ends this process's part. With a status other than 0 it does not wait for the others, which torchrun ends."""
    if not dist.is_initialized():
        return
    if status != 0:
        if _meetings:
            with suppress(RuntimeError):  # the store has ended
                _meetings[-1].failed()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


def layout(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], torch.dtype]]:
    """Names of all parameters and buffers, also of tied ones, with the first name, shape and dtype of each."""
    first: dict[Tensor, str] = {}
    parameters = [(n, first.setdefault(p, n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    buffers = [(n, n, b) for n, b in model.named_buffers(remove_duplicate=False)]
    return [(name, owner, tuple(x.shape), x.dtype) for name, owner, x in (*parameters, *buffers)]


def load_on_main(distributed: Distributed, load: Callable[[bool], tuple[M, T]]) -> tuple[M, T]:
    """Loads a model, in each process or, under FSDP2, with weights in the first process alone.

    `load(weights)` gives the model and what belongs to it. What a configuration does not describe, such as quantised
    weights and adapters that lie in the folder, makes the first model differ from those without weights: then each
    process loads it whole.

    Raises:
        UserError: the first process cannot load it. All raise this.
    """
    if distributed.strategy != "fsdp" or distributed.size == 1:
        return load(True)
    loaded: tuple[M, T] | None = None
    found: Any = None
    try:
        loaded = load(distributed.is_main)
        found = layout(loaded[0])
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

    In bfloat16 the layers are gathered in it, and gradients are summed in fp32. Autocast alone would gather them in
    fp32 and keep its bfloat16 copies until backward, so that each process would hold the whole model.

    Where any process has a model without weights, all get the first one's.
    """
    sent = distributed.any_rank(not has_weights(model))
    if sent:
        _check_layouts(model, distributed)
    # detached: fully_shard puts the parts in the parameters, and these keep the whole
    whole = {name: p.detach() for name, p in model.named_parameters()} if sent and distributed.is_main else {}
    mesh = init_device_mesh(distributed.device.type, (distributed.size,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    how: dict[str, Any] = {"mp_policy": half} if dtype == "bfloat16" else {}
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh)  # embeddings, norms and heads stay in fp32, as with DDP
    if sent:
        _send(model, distributed, whole)


def _check_layouts(model: nn.Module, distributed: Distributed) -> None:
    """Refuses models that differ between processes, which would wait for each other or exchange wrong weights."""
    layouts = distributed.all_gather_object(layout(model))
    for rank, theirs in enumerate(layouts):
        if theirs != layouts[0]:
            odd = sorted({x[0] for x in {*theirs} ^ {*layouts[0]}})
            raise UserError(
                f"the model of rank {rank} differs from that of rank 0 in {', '.join(odd[:1]) or 'its order'}: build it"
                " from the same configuration"
            )


@torch.no_grad()
def _send(model: nn.Module, distributed: Distributed, whole: dict[str, Tensor]) -> None:
    """Gives each process its part of a sharded model's weights, and all buffers, from the first process.

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
    """Writes a whole tensor to a whole or sharded one; collective."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def shard_like(target: Tensor, source: Tensor) -> Tensor:
    """A whole tensor, laid out as `target` is; collective."""
    made = torch.empty_like(target, dtype=source.dtype, requires_grad=False)
    copy_from_full(made, source)
    return made
