"""The tensors and options of gae, as ppo_fast.ops builds them for every implementation."""

from typing import NamedTuple

from torch import Tensor


class GAEOptions(NamedTuple):
    """Everything but rewards and values. A row is a row of [..., T], a column of [T, N], or a piece of cu_seqlens."""

    gamma: float | Tensor  # or one per row
    lam: float | Tensor
    mask: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    bootstrap: Tensor | None = None  # one per row
    final_values: Tensor | None = None
    cu_seqlens: Tensor | None = None  # [S + 1]
    time_major: bool = False
    critic_lam: float | Tensor | None = (
        None  # lambda of the returns, if not lam: for rows with a mask, without other flags
    )
