"""TRL: log-probabilities and entropies of its trainers, and the whitening of its last PPOTrainer.

>>> import ppo_fast.integrations.trl as fast  # doctest: +SKIP
>>> fast.patch()  # before or after a trainer is made; fast.unpatch() takes it back  # doctest: +SKIP

Tested with TRL 1.16 (GRPO and its relatives) and 1.12 (the last one with a PPOTrainer).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.integrations._patch import Patch, peer

_utils = peer("trl", "trl.trainer.utils", "pip install trl")
_theirs = _utils.selective_log_softmax
_their_function: Any = getattr(_utils, "_ChunkedLogProbFunction", None)  # since 1.13
TESTED = ("1.16.", "1.12.")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of `index` [...] under logits [..., V], in the logits' dtype.

    `row_mask`: 0 where a row is left out and 0 is returned. An index [..., K], several for each row, is TRL's own.
    """
    if index.ndim != logits.ndim - 1:
        options: dict[str, Any] = {} if temperature == 1.0 else {"temperature": temperature}
        return _theirs(logits, index, **options, **({} if row_mask is None else {"row_mask": row_mask}))
    logprobs = ppo.token_logprobs(logits, index, _counted(row_mask), temperature=temperature)
    assert isinstance(logprobs, Tensor)
    return logprobs.to(logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy [...] of softmax(logits [..., V]) in nats, in the logits' dtype. `chunk_size` is not needed."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return ppo.token_logprobs(logits, index, with_entropy=True)[1].to(logits.dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both from one read of the logits; without `entropy_requires_grad` the entropy has no graph."""
    logprobs, entropy = ppo.token_logprobs(
        logits, index, _counted(row_mask), temperature=temperature, with_entropy=True
    )
    entropy = entropy if entropy_requires_grad else entropy.detach()
    return logprobs.to(logits.dtype), entropy.to(logits.dtype)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the mask; 0 outside it, where TRL leaves numbers that it masks later."""
    counted = int(mask.sum())
    if counted < 2:
        raise ValueError(f"whitening needs two elements or more, the mask has {counted}")
    return ppo.masked_whiten(values, mask, shift_mean=shift_mean).to(values.dtype)


class ChunkedLogProbFunction:
    """Log-probabilities from hidden states and LM head, as TRL's autograd function of this name, by `linear_logprobs`.

    GRPO's forward and loss go through it. What only other trainers ask for (log_sum_sq_probs, mean_logits, is_top1) is
    left to TRL's own.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """hidden [N, D], weight [V, D], bias [V], targets [N] -> logprobs [N], entropy [N] and three times None.

        `chunk_size` is TRL's; ours are cut by memory.
        """
        if set(outputs) - {"log_probs", "entropy"}:
            return _their_function.apply(
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, outputs),
            )
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            found = ppo.linear_logprobs(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                bias=None if bias is None else bias.to(dtype),
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                with_entropy="entropy" in outputs,
            )
        return (*found, None, None, None) if isinstance(found, tuple) else (found, None, None, None, None)


def _counted(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _replacements() -> dict[str, Callable[..., Any]]:
    ours = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
    found: dict[str, Any] = {f"trl.trainer.utils:{f.__name__}": f for f in ours if hasattr(_utils, f.__name__)}
    if _their_function is not None:
        found["trl.trainer.utils:_ChunkedLogProbFunction"] = ChunkedLogProbFunction
    try:
        peer("trl", "trl.experimental.ppo.ppo_trainer", "pip install trl==1.12.0")
    except ImportError:  # later ones have no PPO
        return found
    return {**found, "trl.experimental.ppo.ppo_trainer:masked_whiten": masked_whiten}


_patch = Patch("trl", TESTED, _replacements())


def patch(*, any_version: bool = False, quiet: bool = False) -> Patch:
    """Replaces TRL's functions by these; also for `with patch(): ...`.

    Raises:
        RuntimeError: another version of TRL is installed, or it is patched already.
    """
    return _patch.apply(any_version=any_version, quiet=quiet)


def unpatch() -> None:
    """Takes them back."""
    _patch.undo()
