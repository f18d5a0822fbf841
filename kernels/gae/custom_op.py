"""gae in front of its backends: the public signature, and what torch.compile sees, one opaque operator."""

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.kernels.common.scalars import as_number, as_tensor


def make_operator(name: str, gae: Callable[..., tuple[Tensor, Tensor]]) -> torch.library.CustomOpDef:
    """ppo_fast::gae_<name> for gae(rewards, values, gamma, lam, ...). New values of gamma and lam compile nothing.

    Its outputs are contiguous, in fp32, or in fp64 if an input is.
    """

    def run(rewards: Tensor, values: Tensor, gamma: Tensor, lam: Tensor, *rest: Tensor | bool | None):
        advantages, returns = gae(rewards, values, as_number(gamma), as_number(lam), *rest)
        return advantages.contiguous(), returns.contiguous()

    operator = torch.library.custom_op(
        f"ppo_fast::gae_{name}",
        run,
        mutates_args=(),
        schema="(Tensor rewards, Tensor values, Tensor gamma, Tensor lam, Tensor? mask, Tensor? terminated,"
        " Tensor? truncated, Tensor? bootstrap, Tensor? final_values, Tensor? cu_seqlens, bool time_major)"
        " -> (Tensor, Tensor)",
    )

    def fake(rewards: Tensor, values: Tensor, *_: Tensor | bool | None) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        like = rewards.new_empty(rewards.shape, dtype=wide)
        return like, torch.empty_like(like)

    operator.register_fake(fake)
    return operator


def public_function(name: str, implementation: Callable[..., tuple[Tensor, Tensor]]) -> Callable:
    """gae of a backend, with the signature of reference.py. Advantages and returns carry no graph: they are data."""
    operator = make_operator(name, implementation)

    def gae(
        rewards: Tensor,  # [..., T]; [T, ...] if time_major; [total] with cu_seqlens
        values: Tensor,
        *,
        gamma: float | Tensor = 1.0,  # or one per row
        lam: float | Tensor = 0.95,
        mask: Tensor | None = None,
        terminated: Tensor | None = None,
        truncated: Tensor | None = None,
        bootstrap: Tensor | None = None,  # one per row
        final_values: Tensor | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        time_major: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """reference.gae."""
        rest = mask, terminated, truncated, bootstrap, final_values, cu_seqlens, time_major
        if torch.compiler.is_compiling():
            return operator(rewards.detach(), values.detach(), as_tensor(gamma), as_tensor(lam), *rest)
        return implementation(rewards, values, gamma, lam, *rest)

    return gae
