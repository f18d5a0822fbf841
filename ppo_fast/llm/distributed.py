"""Distributed training under torchrun: how work is split over ranks and how results are reduced.

Each rank samples and scores its part of a step's prompts. Then all ranks gather the whole rollout, from which each
computes advantages, whitening, statistics and the order of minibatches, so that these are equal. The packs of a
minibatch are assigned to ranks, and the gradient, summed over ranks, is that of one process on the whole batch.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ppo_fast.common.device import has_weights, pick_device
from ppo_fast.common.errors import UserError
from ppo_fast.common.launched import address, local_rank, process_count, this_rank
from ppo_fast.llm.barrier import MonitoredBarrier
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.packing.rollout import CPU, Rollout, join_rollouts, join_scores

T = TypeVar("T")

# in the error of a collective operation that waited for a process that has ended, or too long for a slow one
LOST = ("closed by peer", "reset by peer", "broken pipe", "got 0 bytes", "ncclremoteerror", "communicator was aborted")
TIMED_OUT = ("timed out", "timeout", "timing out")


@dataclass(eq=False)
class Distributed:
    """The processes of a run: one, unless torchrun started several."""

    rank: int
    size: int
    strategy: str  # one, ddp or fsdp
    device: torch.device
    wrapped: nn.Module | None = None  # the policy, ready to be called in several processes
    monitor: MonitoredBarrier | None = None  # None: this process is alone

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def local_rows(self, rows: Sequence[T]) -> list[T]:
        """This rank's consecutive part of the rows; the sizes of two ranks differ by at most one."""
        ends = [len(rows) * r // self.size for r in (self.rank, self.rank + 1)]
        return list(rows[ends[0] : ends[1]])

    def assign_packs(self, packs: Sequence[T]) -> list[T | None]:
        """This rank's packs, equally many in each rank: None where no pack is left."""
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

    def monitored_barrier(self, where: str, *, signal: str = "") -> str:
        """Wait for all processes, which have done what `where` says; return a signal that one of them received.

        Raises:
            UserError: a process failed, or is later than config.process_timeout; the message names it.
        """
        return signal if self.monitor is None else self.monitor(where, signal=signal)

    def all_gather_object(self, x: T) -> list[T]:
        """The objects of all processes, by rank."""
        if self.size == 1:
            return [x]
        found = [x] * self.size
        dist.all_gather_object(found, x)
        return found

    def check_equal(self, parts: Mapping[str, object]) -> None:
        """Check that named values are equal in all processes that give them.

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
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call the function in the main process; all processes return its result, or raise its UserError."""
        if self.size == 1:
            return function()
        found: T | UserError | None = None
        if self.is_main:
            try:
                found = function()
            except UserError as error:
                found = error
        answer = self.all_gather_object(found)[0]
        if isinstance(answer, UserError):
            raise answer
        return cast(T, answer)  # None only if the function returned it

    def run_with_weights(self, function: Callable[[], T], *, of: nn.Module) -> T:
        """Call a function that needs the weights of a model; collective under FSDP2.

        It is called in the main process only, for all, if another one has no weights of the model.
        """
        alone = self.strategy == "fsdp" and self.any_rank(not has_weights(of))
        return self.run_on_main(function) if alone else function()

    def gather_rollout(self, rollout: Rollout, scores: Tensor, pad: int) -> tuple[Rollout, Tensor]:
        """The completions of all processes and their scores, in the order of the prompts."""
        if self.size == 1:
            return rollout, scores
        found = self.all_gather_object((rollout.to(CPU), scores.cpu()))
        parts, theirs = [part for part, _ in found], [some for _, some in found]
        return join_rollouts(parts, pad).to(self.device), join_scores(parts, theirs).to(self.device)

    def reduce_metrics(self, metrics: dict[str, float], count: int) -> dict[str, float]:
        """Metrics over the completions of all processes, of which this one has `count`.

        Counts (`reward_failed/NAME`) are summed, and means are averaged.
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
        """The maximum of each value over processes, as of times: all wait for the slowest process."""
        found = self.all_gather_object(seconds)
        return {name: max(theirs[name] for theirs in found) for name in seconds}

    def wrapped_module(self, policy: nn.Module) -> nn.Module:
        """The module to call instead of the policy."""
        return self.wrapped or policy

    def sync_gradients(self, last: bool) -> AbstractContextManager:
        """Let DDP reduce gradients over processes in the backward of the last micro-batch only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()


SINGLE_PROCESS = Distributed(0, 1, "one", torch.device("cpu"))

_barriers: list[MonitoredBarrier] = []  # of this process; the last one belongs to the newest process group


def _barrier(rank: int, size: int, limit: float) -> MonitoredBarrier:
    store = dist.distributed_c10d._get_default_store()
    if not _barriers or _barriers[-1].store is not store:
        _barriers.append(MonitoredBarrier(store, rank, size, limit))
    _barriers[-1].limit = limit
    return _barriers[-1]


def init_distributed(config: PPOConfig) -> Distributed:
    """Join the process group that torchrun describes in the environment, if there is one.

    Raises:
        UserError: config.parallel asks for several processes, but torchrun did not start this one; or the processes
            have different options.
    """
    size = process_count()
    if size == 1:
        if config.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
            raise UserError("parallel = fsdp needs torchrun: torchrun --nproc-per-node GPUS -m ppo_fast.cli train ...")
        if config.parallel != "fsdp":
            return Distributed(0, 1, "one", pick_device(config.device, config.backend, config.dtype))
    rank, device = this_rank(size), _device_of_rank(config)
    if not dist.is_initialized():
        _join(device, config.process_timeout)
    strategy = "ddp" if config.parallel == "auto" else config.parallel
    distributed = Distributed(rank, size, strategy, device, monitor=_barrier(rank, size, config.process_timeout))
    distributed.check_equal(_shared_options(config))  # first: they decide which collective operations follow
    if config.prompts_per_step < size:
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step} is less than the {size} processes, each of which answers"
            " some of them"
        )
    return distributed


def _shared_options(config: PPOConfig) -> dict[str, object]:
    """The options that are the same in all processes: all but `quiet` and the path of `out`."""
    options = dataclasses.asdict(config) | {"out": "a folder" if config.out is not None else None}
    return {name: x for name, x in options.items() if name != "quiet"}


def _join(device: torch.device, limit: float) -> None:
    """Join the process group that the environment describes; UserError if the other processes do not within `limit`
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
    return pick_device(name, config.backend, config.dtype)


def peer_failure(error: RuntimeError) -> str:
    """Which processes a failed collective operation waited for, in a sentence; "" after any other error."""
    text = str(error).lower()
    collective = dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in text)
    if not collective or not any(part in text for part in (*LOST, *TIMED_OUT)):
        return ""
    missing = ""
    with suppress(RuntimeError):  # the store has ended, too
        try:
            missing = _barriers[-1].lost() if _barriers else ""
        except UserError as failure:
            return str(failure)
    late = any(part in text for part in TIMED_OUT)
    reason = "took longer than process_timeout" if late else "has ended; its own message, if it left one, says why"
    return f"{missing or 'another process'} {reason}"


def shutdown(status: int) -> None:
    """Leave the process group. With a status other than 0 the process ends at once; torchrun ends the others."""
    if not dist.is_initialized():
        return
    if status != 0:
        if _barriers:
            with suppress(RuntimeError):  # the store has ended
                _barriers[-1].failed()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()
