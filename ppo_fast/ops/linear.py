"""linear_logprobs and linear_ppo_loss: their signatures, documentation and checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.kernels.common import memory
from ppo_fast.kernels.linear import custom_op
from ppo_fast.kernels.linear.chunks import linear_product, operand_dtype
from ppo_fast.kernels.linear.options import HeadOptions
from ppo_fast.kernels.loss.options import LossOptions, LossTensors
from ppo_fast.ops import checks
from ppo_fast.ops.backend import Backend, uses_triton
from ppo_fast.ops.checks import Aggregation, KLEstimator, public_operation

_COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


class LinearLossOutput(NamedTuple):
    """The results of `linear_ppo_loss`: a `LossOutput`, and per token the detached `logprobs` and `entropy`."""

    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


def _check_head(
    operation: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    options: HeadOptions,
) -> Tensor | None:
    """Check what both operations have in common, and return the mask as bool."""
    temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted, compute_dtype = options
    if torch.compiler.is_compiling():  # otherwise public_operation does so
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            memory.refuse_distributed(operation, name, x)
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    shape, head = hidden.shape, weight.shape
    if not shape or len(head) != 2 or head[1] != shape[-1] or not head[0]:
        raise ValueError(
            f"hidden must have shape [..., D] and weight [V, D] with V > 0, got {tuple(shape)} and {tuple(head)}"
        )
    if compute_dtype is None:
        if hidden.dtype is not weight.dtype:
            raise TypeError(
                f"hidden and weight must have one dtype, unless compute_dtype is given; got {hidden.dtype} and"
                f" {weight.dtype}"
            )
    elif compute_dtype not in _COMPUTE or torch.float64 in (hidden.dtype, weight.dtype):
        raise ValueError(
            f"compute_dtype must be float32, bfloat16 or float16 with tensors of these dtypes, got {compute_dtype} with"
            f" {hidden.dtype} and {weight.dtype}"
        )
    device = hidden.device
    if weight.device != device:
        checks.device("weight", weight, device, "hidden")
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, head[:1], "weight's rows")
        checks.device("bias", bias, device, "hidden")
    rows = shape[:-1]
    mask = checks.flag("mask", mask, rows, device, "hidden without its last dimension")
    checks.token_ids(tokens, mask, rows, device, "hidden without its last dimension", head[0])
    checks.temperature(temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    if not logit_scale > 0:
        checks.positive("logit_scale", logit_scale)
    if chunk_bytes is not None:
        checks.positive("chunk_bytes", chunk_bytes)
    operand = hidden.dtype if compute_dtype is None else compute_dtype
    if logits_dtype is not None and logits_dtype not in (torch.float32, operand):
        raise ValueError(f"logits_dtype must be torch.float32 or the dtype of operands, {operand}; got {logits_dtype}")
    if mask is not None and memory.traced(hidden, mask):
        raise NotImplementedError(
            "mask is not supported under make_fx and FakeTensorMode, since the number of rows would depend on its"
            " values; use torch.compile, or drop the masked rows first"
        )
    if num_counted is not None:
        if mask is None:
            raise ValueError(f"num_counted={num_counted} belongs to a mask, which was not given")
        if checks.readable(mask) and int(mask.sum()) != num_counted:
            raise ValueError(f"num_counted must be the number of counted tokens, {int(mask.sum())}; got {num_counted}")
    return mask


def operand_of_head(weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return an LM head [V, D] in the dtype that `head_logits` multiplies, so that many calls convert it once."""
    return weight.detach().to(operand_dtype(weight.device, compute_dtype))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, compute_dtype: torch.dtype) -> Tensor:
    """Compute h W^T + b by the products of `linear_logprobs`, without gradients: what a sampler needs of an LM head.

    Args:
        hidden: [..., D]; weight: [V, D]; bias: [V] or None.
        compute_dtype: as in `linear_logprobs`.

    Returns:
        [..., V] fp32.
    """
    logits = linear_product(hidden.detach(), weight.detach(), compute_dtype)
    return logits if bias is None else logits.add_(bias.detach())


@public_operation
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` straight from hidden states: the logits exist only a chunk of tokens at a time.

    z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature, without softcap logit_scale (h W^T + b) /
    temperature. Without gradients this is one GEMM; the backward pass recomputes each chunk (four GEMMs in all), so
    that any gradient per token is possible. For PPO's own loss see `linear_ppo_loss`, which needs three.

    Args:
        hidden: [..., D]; weight: [V, D], the LM head; bias: [V] or None.
        tokens, mask: [...]; rows that do not count are dropped before the first GEMM. On a GPU a mask costs one wait
            for its count, unless num_counted gives it.
        softcap: of Gemma 2; logit_scale: of Cohere.
        chunk_bytes: size limit of the chunk buffers; the default depends on shapes and dtypes only.
        logits_dtype: fp32, or the dtype of the operands for less traffic and less exact log-probabilities.
        compute_dtype: to which the operands of all products (hidden, weight, gradients of logits) are rounded; they are
            accumulated in fp32, and gradients have the dtypes of hidden and weight, which may then differ. None: that
            of hidden. A device that has no such products with fp32 results multiplies in fp32, which is more exact.

    Returns:
        logp [...], or (logp, entropy), fp32 (fp64 for fp64), 0 where masked.

    >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    >>> logp = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
    >>> [round(x, 4) for x in logp.tolist()]
    [-0.5514, -0.2395]
    """
    options = HeadOptions(temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted, compute_dtype)
    mask = _check_head("linear_logprobs", hidden, weight, bias, tokens, mask, options)
    use_triton = uses_triton(backend, hidden, weight, bias)
    return custom_op.linear_logprobs(
        hidden, weight, bias, tokens, mask, options, with_entropy=with_entropy, use_triton=use_triton
    )


@public_operation
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
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
    kl_estimator: KLEstimator = "k2",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> LinearLossOutput:
    """`policy_loss` straight from hidden states, with all gradients computed in the forward pass: three GEMMs.

    The gradient of a token's loss with respect to its logits depends on that row alone, so each chunk of tokens goes
    from logits to the gradients of hidden states and weight at once, and its logits are not kept. The entropy of each
    token is computed inside, so entropy_coef needs no argument of its own. There is no value term.

    Args:
        hidden, weight, tokens, mask, bias, temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted,
            compute_dtype: as in `linear_logprobs`.
        old_logprobs: [...], or None for this pass's own, detached: every ratio is then 1.
        advantages: [...], one for each token. All other options: as in `policy_loss`.

    Returns:
        loss, stats as of `policy_loss` with entropy, and logprobs and entropy per token, detached.

    >>> hidden, weight = torch.eye(2), torch.zeros(3, 2, requires_grad=True)
    >>> out = linear_ppo_loss(hidden, weight, torch.tensor([0, 2]), None, torch.tensor([1.0, -1.0]))
    >>> out.stats["ratio_mean"].item(), round(out.entropy[0].item(), 4)
    (1.0, 1.0986)
    """
    head_options = HeadOptions(temperature, softcap, logit_scale, chunk_bytes, logits_dtype, num_counted, compute_dtype)
    mask = _check_head("linear_ppo_loss", hidden, weight, bias, tokens, mask, head_options)
    checks.floating("advantages", advantages)
    checks.shape("advantages", advantages, tokens.shape, "tokens")
    checks.device("advantages", advantages, hidden.device, "hidden")
    same = advantages.shape, advantages.dtype, advantages.device
    if not checks.alike(*same, old_logprobs, ref_logprobs, weights):
        for name, x in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("weights", weights)):
            if x is not None:
                checks.matching(name, x, advantages, "advantages")
    if ref_logprobs is None and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, which was not given")
    tensors = LossTensors(old_logprobs, advantages, mask, weights, ref_logprobs, None, None, None, cu_seqlens)
    options = LossOptions(
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_clamp,
        entropy_coef,
        kl_coef,
        kl_estimator,
        1.0,
        None,
        aggregation,
        denominator,
        norm_length,
    )
    checks.policy_options(options)
    checks.loss_aggregation("advantages", advantages, options, cu_seqlens)
    use_triton = uses_triton(backend, hidden, weight, bias, old_logprobs, advantages, ref_logprobs, weights)
    output = custom_op.linear_ppo_loss(
        hidden, weight, bias, tokens, tensors, options, head_options, use_triton=use_triton
    )
    return LinearLossOutput(*output)
