"""Actor and critic as one module: log-probabilities and values of a pack, and the loss that trains both.

The loss is computed inside `forward`, so that a wrapper (DDP, FSDP2) has a hook on every parameter that it uses. Old
log-probabilities and the loss are computed by the same code, and a pack that does not change gives the same bits: the
first ratio is exactly 1.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

import ppo_fast as ppo
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import (
    GenerateInfo,
    HeadInfo,
    LanguageModel,
    decoder_of,
    head_dtype,
    hidden_states,
    linear_head_of,
    logprobs_of,
    own_generate,
)
from ppo_fast.llm.models.modes import autocast, compiled_layers
from ppo_fast.llm.models.reference import AdapterReference, FrozenReference, Reference
from ppo_fast.llm.packing.attention import cudnn_attention, packed_attention
from ppo_fast.llm.packing.pack import Pack
from ppo_fast.llm.sharding import keep_gathered
from ppo_fast.ops.backend import Backend
from ppo_fast.ops.checks import Aggregation, KLEstimator


@dataclass(frozen=True)
class PolicyOutput:
    """What actor and critic compute of a pack without gradients: [n] fp32 each, and [S] after the last token.

    Values are in units of the reward.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    bootstrap_values: Tensor


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a pack needs besides the models, [n] each, and how the whole minibatch is normalised."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor  # in units of the critic's head, as the returns
    returns: Tensor
    ref_logprobs: Tensor | None  # for a KL term in the loss
    weights: Tensor | None  # truncated importance weights, sampler to trainer
    denominator: float  # tokens, or sequences, of the minibatch
    kl_coef: float
    entropy_coef: float


class _Aggregation(TypedDict):
    """The options by which the losses of tokens become one."""

    aggregation: Aggregation
    denominator: float
    backend: Backend
    cu_seqlens: Tensor | None
    norm_length: float | None


class _PolicyOptions(_Aggregation):
    """The options of the policy term."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    ref_logprobs: Tensor | None
    kl_coef: float
    kl_estimator: KLEstimator
    weights: Tensor | None


CHUNK_TOKENS = 4096  # of a chunk of logits on a GPU, unless memory is short: see kernels/linear/chunks.py


def with_chunk_bytes(config: PPOConfig, vocabulary: int, memory: int | None) -> PPOConfig:
    """The configuration with `chunk_bytes` decided, once for the whole run: a run's bits depend on it.

    Args:
        config: if it names `chunk_bytes`, nothing changes.
        vocabulary: V.
        memory: bytes of the device, or None on a CPU, where the default of the operations is small enough.
    """
    if config.chunk_bytes is not None or memory is None:
        return config
    at_most = memory // 16
    logits_and_gradients = 2 * 4 * vocabulary * CHUNK_TOKENS  # both fp32
    return config if logits_and_gradients <= at_most else dataclasses.replace(config, chunk_bytes=at_most)


class Policy(nn.Module):
    """The actor and the critic, with the way in which each is computed, as detected at load.

    Args:
        actor: the language model that is trained.
        critic: with a backbone of its own, or a value head on the actor's hidden states.
        head: how the actor's hidden states and logits are computed.
        config: dtype, temperature and the options of the loss are read.
        critic_head: how the critic's own backbone is computed; as the actor if not given.
        generate_info: how the actor's own `generate` is used.
    """

    def __init__(
        self,
        actor: LanguageModel,
        critic: Critic,
        head: HeadInfo,
        config: PPOConfig,
        *,
        critic_head: HeadInfo | None = None,
        generate_info: GenerateInfo = GenerateInfo(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.head = head
        self.critic_head = critic_head or head
        self.generate_info = generate_info
        self.config = config
        self.unreached: list[str] = []  # parameters that the loss does not depend on

    def packing_models(self) -> list[nn.Module]:
        """The models that take packed rows."""
        return [model for model, head in ((self.actor, self.head), (self.critic, self.critic_head)) if head.packed]

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 compute on fp32 master weights, if so configured."""
        return autocast(self.config.dtype, next(self.actor.parameters()).device)

    def forward(self, pack: Pack, inputs: LossInputs, *, train_actor: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a pack and its statistics. Without `train_actor` it is the loss of the critic alone."""
        config = self.config
        with self.autocast():
            with torch.set_grad_enabled(train_actor and torch.is_grad_enabled()):
                hidden = self._actor_states(pack) if self._needs_actor_states(train_actor) else None
            loss = inputs.advantages.new_zeros(())
            stats: dict[str, Tensor] = {}
            if train_actor:
                loss, stats = self._policy_loss(pack, inputs, hidden)
            values = ppo.value_loss(
                self.critic.normalized(self._critic_states(pack, hidden)[pack.logit_positions]),
                inputs.old_values,
                inputs.returns,
                clip=config.value_clip,
                **_aggregation(config, pack, inputs),
            )
            return loss + config.value_coef * values.loss, {**stats, **values.stats}

    def evaluate(self, pack: Pack) -> PolicyOutput:
        """Log-probabilities and entropies of the pack's counted tokens, and the values of their prefixes."""
        with self.autocast():
            hidden = self._actor_states(pack) if self._needs_actor_states() else None
            logprobs, entropy = logprobs_of(self.actor, self.head, pack, self.config, hidden=hidden)
            states = self._critic_states(pack, hidden)
            values, after = self.critic(states[pack.logit_positions]), self.critic(states[pack.last])
            return PolicyOutput(logprobs, entropy, values, bootstrap_values=after)

    def value_states(self, pack: Pack) -> Tensor:
        """[n, D]: the hidden states that the value head reads at the pack's counted tokens."""
        with self.autocast():
            return self._critic_states(pack, None)[pack.logit_positions]

    def adapter_logprobs(self, pack: Pack, reference: AdapterReference) -> Tensor:
        """Log-probabilities [n] under the actor's own weights without, or with other, adapters."""
        with self.autocast(), reference():
            return logprobs_of(self.actor, self.head, pack, self.config)[0]

    def generate(self, **options: object) -> Tensor:
        """Call the actor's own `generate` as a method of this module, for which FSDP2 gathers its weights."""
        with keep_gathered(self) if self.config.gather_for_sampling else nullcontext():
            return own_generate(self.actor)(**options)

    def _policy_loss(self, pack: Pack, inputs: LossInputs, hidden: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        options: _PolicyOptions = {
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "dual_clip": config.dual_clip,
            "entropy_coef": inputs.entropy_coef,
            "ref_logprobs": inputs.ref_logprobs,
            "kl_coef": inputs.kl_coef if inputs.ref_logprobs is not None else 0.0,
            "kl_estimator": config.kl_loss_estimator,
            "weights": inputs.weights,
            **_aggregation(config, pack, inputs),
        }
        if self.head.linear and hidden is not None:
            layer = linear_head_of(self.actor)
            out = ppo.linear_ppo_loss(
                hidden[pack.logit_positions],
                layer.weight,
                pack.tokens,
                inputs.old_logprobs,
                inputs.advantages,
                bias=layer.bias,
                temperature=config.temperature,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
                chunk_bytes=config.chunk_bytes,
                compute_dtype=head_dtype(config),
                **options,
            )
            return out.loss, out.stats
        logprobs, entropy = logprobs_of(self.actor, self.head, pack, config)
        plain = ppo.policy_loss(logprobs, inputs.old_logprobs, inputs.advantages, entropy=entropy, **options)
        return plain.loss, plain.stats

    def _needs_actor_states(self, train_actor: bool = True) -> bool:
        return (self.head.linear and train_actor) or self.critic.backbone is None

    def _actor_states(self, pack: Pack) -> Tensor:
        return hidden_states(decoder_of(self.actor), pack, self.head)

    def _critic_states(self, pack: Pack, actor_states: Tensor | None) -> Tensor:
        """[total, D]: the input of the value head, from the critic's own backbone or shared with the actor."""
        if self.critic.backbone is not None:
            return hidden_states(self.critic.backbone, pack, self.critic_head)
        return self._actor_states(pack) if actor_states is None else actor_states


def _aggregation(config: PPOConfig, pack: Pack, inputs: LossInputs) -> _Aggregation:
    return {
        "aggregation": config.aggregation,
        "denominator": inputs.denominator,
        "backend": config.backend,
        "cu_seqlens": pack.cu_completions if config.aggregation.startswith("seq-") else None,
        "norm_length": float(config.max_new_tokens) if config.aggregation == "seq-mean-token-sum-norm" else None,
    }


@contextmanager
def packed_mode(policy: Policy, reference: Reference = None) -> Iterator[None]:
    """Actor, critic and reference take packed rows inside this block, if they can."""
    models = policy.packing_models()
    if isinstance(reference, FrozenReference) and reference.head.packed:
        models.append(reference)
    cudnn, compiled = policy.config.cudnn_attention, policy.config.compile_layers
    attention = packed_attention(*models, cudnn=cudnn, compiled=compiled) if models else cudnn_attention(enabled=cudnn)
    with attention, compiled_layers(*models, enabled=compiled):
        yield


def reference_logprobs(policy: Policy, reference: FrozenReference | AdapterReference, pack: Pack) -> Tensor:
    """Log-probabilities [n] of a pack's counted tokens under the reference."""
    if isinstance(reference, AdapterReference):
        return policy.adapter_logprobs(pack, reference)
    return reference(pack)
