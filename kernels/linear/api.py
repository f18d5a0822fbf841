"""linear_logprobs and linear_ppo_loss in front of their two backends: names and signatures.

reference.py says what is computed, linear_steps.py in which order. In eager mode an autograd.Function runs it, or
nothing at all where no gradient is wanted; under torch.compile an operator of linear_compiled.py does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.kernels.common.autograd import direct_apply
from ppo_fast.kernels.common.memory import refuse_distributed
from ppo_fast.kernels.linear.custom_op import logprobs_operator, pack_options, pack_settings, ppo_operator
from ppo_fast.kernels.linear.function import (
    LinearLogprobs,
    LinearPPO,
    LogprobsCall,
    PPOCall,
    PPOResult,
    RowMath,
    Settings,
    logprobs_forward,
    ppo_forward,
)
from ppo_fast.kernels.loss.options import LossOptions, LossTensors, named_stats, stat_names

_apply_logprobs, _apply_ppo = direct_apply(LinearLogprobs), direct_apply(LinearPPO)


def _refuse_distributed(name: str, **tensors: Tensor | None) -> None:
    for argument, x in tensors.items():
        refuse_distributed(name, argument, x)


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which gradients are wanted."""
    enabled = torch.is_grad_enabled()
    return tuple([enabled and x is not None and x.requires_grad for x in tensors])


def public_functions(math_: RowMath) -> tuple[Callable, Callable]:
    """linear_logprobs and linear_ppo_loss of a backend, with the signatures of reference.py."""
    logprobs_op, ppo_op = logprobs_operator(math_), ppo_operator(math_)

    def linear_logprobs(
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        tokens: Tensor,  # [...]
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,  # [V]
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        with_entropy: bool = False,
        chunk_bytes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        num_counted: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """reference.linear_logprobs, a chunk of tokens at a time; gradients flow to hidden, weight and bias."""
        _refuse_distributed("linear_logprobs", hidden=hidden, weight=weight, bias=bias)
        s = Settings(temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted)
        needs = _needs(hidden, weight, bias)
        if torch.compiler.is_compiling():
            inputs = hidden, weight, bias, tokens, mask, pack_settings(s), with_entropy, list(needs), *s[3:]
            logprobs, entropy = logprobs_op(*inputs)[:2]
        elif any(needs):
            call = LogprobsCall(tokens, mask, s, with_entropy, math_)
            return _apply_logprobs(hidden, weight, bias, call)
        else:
            out = logprobs_forward(math_, hidden, weight, bias, tokens, mask, s, with_entropy, keep_statistics=False)
            logprobs, entropy = out[0], out[0] if out[1] is None else out[1]
        return (logprobs, entropy) if with_entropy else logprobs

    def linear_ppo_loss(
        hidden: Tensor,  # [..., T, D]
        weight: Tensor,  # [V, D]
        tokens: Tensor,  # [..., T]
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        log_ratio_clamp: float = 20.0,
        entropy_coef: float = 0.0,
        ref_logprobs: Tensor | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k2",
        weights: Tensor | None = None,
        aggregation: str = "token-mean",
        denominator: float | Tensor | None = None,
        norm_length: float | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,  # [V]
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_bytes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        num_counted: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """reference.linear_ppo_loss; gradients flow to hidden, weight and bias, and are made here."""
        _refuse_distributed("linear_ppo_loss", hidden=hidden, weight=weight, bias=bias)
        t = LossTensors(old_logprobs, advantages, mask, weights, ref_logprobs, cu_seqlens=cu_seqlens)
        o = LossOptions(
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            aggregation=aggregation,
            denominator=denominator,
            norm_length=norm_length,
        )
        s = Settings(temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted)
        needs = _needs(hidden, weight, bias)
        if torch.compiler.is_compiling():
            given = denominator if isinstance(denominator, Tensor) else None
            tensors = hidden, weight, bias, tokens, *t[:5], cu_seqlens, given, pack_options(s, o)
            loss, packed, logprobs, entropy, *_ = ppo_op(*tensors, kl_estimator, aggregation, list(needs), *s[3:])
            stats = named_stats(packed.detach(), stat_names(True, True, False, t, o))
            return loss, stats, logprobs.detach(), entropy.detach()
        if any(needs):
            results: list[PPOResult] = []
            call = PPOCall(tokens, t, o, s, needs, math_, results)
            loss = _apply_ppo(hidden, weight, bias, call)
            return loss, results[0].stats, results[0].logprobs, results[0].entropy
        result = ppo_forward(math_, hidden, weight, bias, tokens, t, o, s, needs)
        return result.loss, result.stats, result.logprobs, result.entropy

    return linear_logprobs, linear_ppo_loss
