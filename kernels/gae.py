"""Generalised advantage estimation in Triton: reference.gae for padded, packed and time-major tensors.

One launch for most shapes: a program walks the spans of a few rows, from the last to the first. Few long rows, and
packed ones, take two: every span is composed to one affine map by a program of its own, then every program chains the
maps behind its span and writes its results. The arithmetic, and so the bits, are the same; see gae_kernels.py.

Bytes for N steps in fp32 with one flag: 9 N read and 8 N written; with two launches another 9 N read, from the second
level cache if they fit.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.gae_kernels import APPLY, COMPOSE, TILES, WALK, _gae_kernel
from ppo_fast.kernels.launch import Variant

NUM_WARPS = 4
_MANY_ROWS = 2048  # rows, or columns, that keep a GPU busy with one program walking each
_WALK, _COMPOSE, _APPLY = WALK.value, COMPOSE.value, APPLY.value


class Config(NamedTuple):
    """How rows are cut. It depends on T alone, as a row's bits must not depend on the other rows."""

    R: int  # rows in a program
    W: int  # steps in a tile

    @property
    def span(self) -> int:
        return self.W * TILES.value


_COLUMNS, _SHORT, _LONG = Config(R=128, W=16), Config(R=16, W=32), Config(R=4, W=128)


def row_config(T: int) -> Config:
    """For rows whose steps are neighbours in memory."""
    return _SHORT if T <= _SHORT.W else _LONG


def _as_rows(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Two dimensions, the inner one contiguous; copies only where there is no such view."""
    if x is None:
        return None
    x = x.detach().reshape(shape)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def aligned(T: int, tensors: list[Tensor | None]) -> bool:
    """Whether four neighbouring steps of every tensor can be moved at once."""
    given = [x for x in tensors if x is not None]
    return T % 4 == 0 and all(x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0 for x in given)
