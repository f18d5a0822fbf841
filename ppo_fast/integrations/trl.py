"""TRL: log-probabilities and entropies of its trainers, and forward and whitening of its last PPOTrainer.

>>> import ppo_fast.integrations.trl as fast  # doctest: +SKIP
>>> fast.patch()  # before or after a trainer is made; fast.unpatch() undoes it  # doctest: +SKIP

In fp16 and bf16 the results are not TRL's bits: ppo_fast computes in fp32 and rounds the result, TRL also rounds on the
way. With 32 000 logits TRL's error against fp64 is 2 to 8 times ours for entropy and gradients, and 1.0 to 1.1 times
for log-probabilities. TRL's own tests of these functions in fp16 and bf16 require TRL's rounding, so some of them fail
with the patch. In fp32 both agree up to rounding.

Tested with TRL 1.16 (GRPO and its relatives) and 1.12 (the last one with a PPOTrainer, whose advantages, losses and
entropy are lines of one long method, and stay TRL's; without DeepSpeed, DDP or adapters its prompts get no logits).
"""

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import ppo_fast as ppo
from ppo_fast.integrations._patch import Patch, peer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TESTED = ("1.16.", "1.12.")
_utils = peer("trl", "trl.trainer.utils", TESTED)
_theirs = _utils.selective_log_softmax
_their_function = _utils._ChunkedLogProbFunction


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of `index` [...] under logits [..., V], in the logits' dtype.

    `row_mask`: 0 where a row is left out and 0 is returned. An index [..., K], several for each row, is TRL's own.
    """
    if index.ndim != logits.ndim - 1:
        options: dict[str, object] = {} if temperature == 1.0 else {"temperature": temperature}
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


class ChunkedLogProbFunction112:
    """The same for TRL 1.12, whose function has no bias and two results, of which the entropy has no graph."""

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """last_hidden [N, D], weight [V, D], targets [N] -> logprobs [N], entropy [N]."""
        with torch.autocast(last_hidden.device.type, enabled=False):
            logprobs, entropy = ppo.linear_logprobs(
                last_hidden,
                weight.to(last_hidden.dtype),
                targets,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                with_entropy=True,
            )
        return logprobs, entropy.detach()


class _AnswerLogits:
    """A lazy substitute of logits [B, T, V], whose slices are computed at their use."""

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        self.head = head
        self.hidden = hidden  # [B, T, D]

    def __getitem__(self, steps: slice | tuple[slice, ...]) -> Tensor:
        return self.head(self.hidden[steps])


class PPOForward:
    """`forward` of TRL 1.12's PPOTrainer, by the decoder alone: the LM head is applied to answers, not to prompts.

    TRL slices the answers out of all logits. A model whose logits are not its linear LM head times its decoder's
    hidden states (looked at once), one with adapters, and one that accelerate has wrapped, are left to TRL's own.
    """

    def __init__(self, theirs: Callable[..., object], wrapper: type) -> None:
        self.theirs = theirs
        self.wrapper = wrapper
        self.plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, query_responses: Tensor, pad_token_id: int) -> object:
        """query_responses [B, T] -> what has `.logits`; of policy and critic together also values [B, T, 1]."""
        policy = cast("PreTrainedModel", model.policy if hasattr(model, "policy") else model)
        mask = query_responses != pad_token_id
        ids = query_responses.masked_fill(~mask, 0)  # a pad token may lie beyond the embedding
        if not self._is_plain(model, policy, ids):
            return self.theirs(model, query_responses, pad_token_id)
        inputs: dict[str, object] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) - mask.long(),
            "use_cache": False,
        }
        hidden = policy.get_decoder()(**inputs).last_hidden_state
        output = SimpleNamespace(logits=_AnswerLogits(policy.get_output_embeddings(), hidden))
        if model is policy:
            return output
        both: Any = model  # TRL's PolicyAndValueWrapper
        states = both.critic_backbone(**inputs, output_hidden_states=True).hidden_states[-1]
        return output, both.value_model.score(states)

    def _is_plain(self, model: nn.Module, policy: "PreTrainedModel", ids: Tensor) -> bool:
        known = model is policy or type(model) is self.wrapper
        if not known or not hasattr(policy, "get_decoder") or hasattr(policy, "peft_config"):
            return False
        if "forward" in vars(model) or "forward" in vars(policy):  # accelerate's mixed precision
            return False
        if policy not in self.plain:
            self.plain[policy] = self._agrees(policy, ids[:1, -8:])
        return self.plain[policy]

    @staticmethod
    @torch.no_grad()
    def _agrees(policy: "PreTrainedModel", ids: Tensor) -> bool:
        head = policy.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        own = policy(input_ids=ids, use_cache=False).logits
        ours = head(policy.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
        bound = 64 * torch.finfo(own.dtype).eps * (1 + own.abs().max())
        return ours.shape == own.shape and bool((ours - own).abs().max() <= bound)


def _counted(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _replacements() -> dict[str, Callable[..., object]]:
    ours = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
    found: dict[str, Callable[..., object]] = {
        f"trl.trainer.utils:{f.__name__}": f for f in ours if hasattr(_utils, f.__name__)
    }
    two_results = "outputs" not in signature(_their_function.forward).parameters
    found["trl.trainer.utils:_ChunkedLogProbFunction"] = (
        ChunkedLogProbFunction112 if two_results else ChunkedLogProbFunction
    )
    if find_spec("trl.experimental.ppo") is not None:  # later ones have no PPO
        ppo_trainer = peer("trl", "trl.experimental.ppo.ppo_trainer", TESTED)
        found["trl.experimental.ppo.ppo_trainer:masked_whiten"] = masked_whiten
        forward = PPOForward(ppo_trainer.forward, ppo_trainer.PolicyAndValueWrapper)
        found["trl.experimental.ppo.ppo_trainer:forward"] = forward
    return found


_patch = Patch("trl", _replacements())


def patch(*, quiet: bool = False) -> Patch:
    """Replace TRL's functions by these; also for `with patch(): ...`.

    Raises:
        RuntimeError: it is patched already.
    """
    return _patch.apply(quiet=quiet)


def unpatch() -> None:
    """Restore TRL's functions."""
    _patch.undo()
