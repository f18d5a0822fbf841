"""gae for torch.compile, in front of launch.py and eager.py. Advantages and returns have no graph: they are data."""

import torch
from torch import Tensor

from ppo_fast.kernels.common.scalars import as_number, as_tensor
from ppo_fast.kernels.gae import eager
from ppo_fast.kernels.gae.options import GAEOptions


def gae(rewards: Tensor, values: Tensor, options: GAEOptions, *, use_triton: bool) -> tuple[Tensor, Tensor]:
    """Advantages and returns, the shape of rewards: reference.gae."""
    if torch.compiler.is_compiling():
        critic_lam = None if options.critic_lam is None else as_tensor(options.critic_lam)
        numbers = as_tensor(options.gamma), as_tensor(options.lam), critic_lam
        operator = _triton_operator if use_triton else _torch_operator
        return operator(rewards.detach(), values.detach(), *numbers, *options[2:-1])
    if use_triton:
        from ppo_fast.kernels.gae import launch

        return launch.gae(rewards, values, options)
    return eager.gae(rewards, values, options)


def _make_operator(name: str, *, use_triton: bool) -> torch.library.CustomOpDef:
    """Register the operator that torch.compile uses. New values of gamma and lam compile nothing.

    Its outputs are contiguous, in fp32, or in fp64 if an input is.
    """

    def run(
        rewards: Tensor,
        values: Tensor,
        gamma: Tensor,
        lam: Tensor,
        critic_lam: Tensor | None,
        *rest: Tensor | bool | None,
    ) -> tuple[Tensor, Tensor]:
        critic = None if critic_lam is None else as_number(critic_lam)
        options = GAEOptions._make((as_number(gamma), as_number(lam), *rest, critic))
        advantages, returns = gae(rewards, values, options, use_triton=use_triton)
        return advantages.contiguous(), returns.contiguous()

    def shapes(rewards: Tensor, values: Tensor, *_: Tensor | bool | None) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
        like = rewards.new_empty(rewards.shape, dtype=wide)
        return like, torch.empty_like(like)

    operator = torch.library.custom_op(
        f"ppo_fast::{name}",
        run,
        mutates_args=(),
        schema="(Tensor rewards, Tensor values, Tensor gamma, Tensor lam, Tensor? critic_lam, Tensor? mask,"
        " Tensor? terminated, Tensor? truncated, Tensor? bootstrap, Tensor? final_values, Tensor? cu_seqlens,"
        " bool time_major) -> (Tensor, Tensor)",
    )
    operator.register_fake(shapes)
    return operator


_triton_operator = _make_operator("gae_triton", use_triton=True)
_torch_operator = _make_operator("gae_torch", use_triton=False)
