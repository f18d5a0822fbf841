"""Floating-point operations of the learn phase that the task needs: those of matrix products, none of them recomputed.

A weight of a matrix costs 2 for each token in forward, 2 in backward for the gradient of its input, where that reaches
a trained weight, and 2 for its own gradient, where it is trained: 6, or 4 for a frozen one under adapters. The LM head
is counted at the counted tokens only. Attention costs 4 for each pair of query and earlier key and each element of the
heads, and twice that in backward. Padding, recomputation under gradient checkpointing and all that is no matrix product
do not count (Chowdhery et al. 2022, PaLM, appendix B, which counts attention in full, not only its causal half).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from ppo_fast.llm.models.head import decoder_of, head_of, text_config
from ppo_fast.llm.models.policy import Policy
from ppo_fast.llm.packing.rollout import Rollout

ADAPTER_PARTS = ("base_layer", "lora_A", "lora_B", "default")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class DecoderFlops:
    """What a decoder costs: for each token, and for each pair of query and key.

    Args:
        forward: of all matrices, for a token.
        backward: the same for the gradients.
        attention: of forward for a pair, by the window of the layers; None: all earlier keys.
        learns: gradients pass through it.
    """

    forward: float
    backward: float
    attention: dict[int | None, float]
    learns: bool

    def total(self, lengths: Sequence[int], *, learns: bool) -> float:
        """FLOPs of sequences of these lengths; without `learns` those of forward alone."""
        learns = learns and self.learns
        tokens = sum(lengths)
        matrices = (self.forward + (self.backward if learns else 0.0)) * tokens
        pairs = {window: sum(_pairs(n, window) for n in lengths) for window in self.attention}
        attention = sum(cost * pairs[window] for window, cost in self.attention.items())
        return matrices + attention * (3 if learns else 1)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of query and key of causal attention over a sequence.

    >>> _pairs(4, None), _pairs(4, 2)
    (10, 7)
    """
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


class LearnFlops:
    """Counts the FLOPs of learning from a rollout, from shapes that are read off the models once."""

    def __init__(self, policy: Policy) -> None:
        self.actor = decoder_flops(decoder_of(policy.actor), text_config(policy.actor))
        backbone = policy.critic.backbone
        self.critic = None if backbone is None else decoder_flops(backbone, text_config(backbone))
        self.actor_states_for_critic = backbone is None
        head = head_of(policy.actor)
        weights = [p for p in head.parameters() if p.ndim > 1] if head is not None else []
        self.head = sum(p.numel() * (6.0 if p.requires_grad else 4.0) for p in weights)
        self.value_head = 6.0 * policy.critic.head.weight.numel()

    def of_epoch(self, rollout: Rollout, *, train_actor: bool) -> float:
        """FLOPs of forward and backward of one pass over the rollout of all processes."""
        lengths = [p + a for p, a in zip(rollout.prompt_lengths, rollout.completion_lengths, strict=True)]
        counted = int(rollout.mask.sum())  # on the CPU
        flops = self.value_head * counted
        if train_actor or self.actor_states_for_critic:
            flops += self.actor.total(lengths, learns=train_actor)
        if train_actor:
            flops += self.head * counted
        return flops + (0.0 if self.critic is None else self.critic.total(lengths, learns=True))

    def of_updates(self, rollout: Rollout, history: Sequence[dict[str, float]], minibatches: int) -> float:
        """FLOPs of the updates of `Learner.update`: those with the gradient of the actor have its `grad_norm`."""
        with_actor = sum("grad_norm" in stats for stats in history)
        parts = {True: with_actor, False: len(history) - with_actor}
        return sum(n / minibatches * self.of_epoch(rollout, train_actor=trains) for trains, n in parts.items() if n)


def decoder_flops(decoder: nn.Module, config: PreTrainedConfig) -> DecoderFlops:
    """Read the costs off the modules of a decoder, in their order, which is that of its forward."""
    forward = backward = 0.0
    first_trained: str | None = None  # the module with the first trained weight: gradients pass all later ones
    share = _share_of_experts(config)
    for place, module in decoder.named_modules():
        unit = ".".join(part for part in place.split(".") if part not in ADAPTER_PARTS)
        for count, trained in _matrices(module):
            below = first_trained is not None and first_trained != unit
            inside = first_trained is not None and place.split(".")[-2:-1] == ["lora_B"]  # behind its lora_A
            used = count * (share if "experts" in place.split(".") else 1.0)
            forward += 2.0 * used
            backward += 2.0 * used * (trained + (below or inside))
        if first_trained is None and any(p.requires_grad for p in module.parameters(recurse=False)):
            first_trained = unit
    return DecoderFlops(forward, backward, _attention(config), learns=first_trained is not None)


def _matrices(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Elements of each matrix of a module itself, and whether it is trained. A look-up in a table is no product."""
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        yield module.in_features * module.out_features, module.weight.requires_grad
    elif not isinstance(module, nn.Embedding):
        for p in module.parameters(recurse=False):
            if p.ndim > 1:
                yield p.numel(), p.requires_grad


def _share_of_experts(config: PreTrainedConfig) -> float:
    """The share of the experts of a mixture that computes a token."""
    chosen = getattr(config, "num_experts_per_tok", None)
    count = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n), None)
    return chosen / count if chosen and count else 1.0


def _attention(config: PreTrainedConfig) -> dict[int | None, float]:
    """FLOPs of forward for a pair of query and key, over the layers with each window."""
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or not heads:
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = getattr(config, "sliding_window", None)
    found: dict[int | None, float] = {}
    for kind in kinds:
        if "attention" in kind and "linear" not in kind:
            seen = window if "sliding" in kind else None
            found[seen] = found.get(seen, 0.0) + 4.0 * heads * size
    return found
