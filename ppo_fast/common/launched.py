"""The environment variables of torchrun: the number of processes, and the rank of this one."""

import os

from ppo_fast.common.errors import UserError


def process_count() -> int:
    """Return WORLD_SIZE; 1 if it is not set.

    Raises:
        UserError: it is not a count, or RANK does not fit.
    """
    size = _integer("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if size < 1:
        raise UserError(f"the environment variable WORLD_SIZE = {size} must be at least 1, the number of processes")
    if size > 1:
        this_rank(size)
    return size


def this_rank(size: int) -> int:
    """Return RANK, of `size` processes.

    Raises:
        UserError: it is missing, or not below `size`.
    """
    rank = _integer("RANK")
    if not 0 <= rank < size:
        raise UserError(f"the environment variable RANK = {rank} must be at least 0 and below WORLD_SIZE = {size}")
    return rank


def address() -> str:
    """Return HOST:PORT of the first process; UserError if one of them is not set."""
    return f"{_value('MASTER_ADDR')}:{_value('MASTER_PORT')}"


def local_rank() -> int:
    """Return LOCAL_RANK, the number of this process on its machine; 0 if it is not set."""
    return _integer("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0


def _value(name: str) -> str:
    if name not in os.environ:
        raise UserError(
            f"the environment variable WORLD_SIZE = {os.environ.get('WORLD_SIZE')} is set, but {name} is not: start all"
            " processes with torchrun, or unset WORLD_SIZE for a run in one process"
        )
    return os.environ[name]


def _integer(name: str) -> int:
    try:
        return int(_value(name))
    except ValueError:
        raise UserError(f"the environment variable {name} = {os.environ[name]!r} must be an integer") from None
