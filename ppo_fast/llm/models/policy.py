"""Actor and critic as one module: what they say about a pack, and the loss that trains them.

The loss is computed inside `forward`, so that a wrapper (DDP, FSDP2) sees every parameter where it expects it. Old
log-probabilities and the loss go through the same code, and a pack that does not change gives the same bits: the first
ratio is exactly 1.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ppo_fast as ppo
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import keep_gathered
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import HeadInfo, Sampling, decoder_of, head_of, hidden_states, logprobs_of
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.models.reference import AdapterReference
from ppo_fast.llm.packing.pack import Pack


@dataclass(frozen=True)
class PolicyOutput:
    """What a pass without gradients says of a pack: [n] fp32 each, [S] after the last token."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    bootstrap_values: Tensor


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs to know of a pack, [n] each, and how the whole minibatch is normalised."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    ref_logprobs: Tensor | None  # for a KL term in the loss
    weights: Tensor | None  # truncated importance weights, sampler to trainer
    denominator: float  # tokens, or sequences, of the minibatch
    kl_coef: float
    entropy_coef: float


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
    """The actor and the critic, and how each is computed, as the probes found it.

    `critic_head` is that of the critic's own backbone; the actor's if not given. `sampling` is how the actor's own
    `generate` is used.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: Critic,
        head: HeadInfo,
        config: PPOConfig,
        *,
        critic_head: HeadInfo | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.head = head
        self.critic_head = critic_head or head
        self.sampling = sampling
        self.config = config
        self.unreached: list[str] = []  # parameters that the loss does not depend on

    def packing_models(self) -> list[nn.Module]:
        """The models that take packed rows."""
        return [model for model, head in ((self.actor, self.head), (self.critic, self.critic_head)) if head.packed]

    def autocast(self) -> AbstractContextManager:
        """bf16 compute on fp32 master weights, if so configured."""
        return autocast(self.config.dtype, next(self.actor.parameters()).device)

    def forward(
        self,
        pack: Pack,
        targets: LossInputs | None = None,
        *,
        train_actor: bool = True,
        reference: AdapterReference | None = None,
    ) -> PolicyOutput | tuple[Tensor, dict[str, Tensor]] | Tensor:
        """Without targets what actor and critic say of the pack; with them the loss, and its statistics.

        With `reference` the log-probabilities [n] under the actor's own weights without, or with other, adapters.
        """
        with self.autocast():
            if reference is not None:
                with reference():
                    return logprobs_of(self.actor, self.head, pack, self.config)[0]
            return self._judge(pack) if targets is None else self._loss(pack, targets, train_actor)

    def generate(self, **options: Any) -> Any:
        """The actor's own; through here, so that FSDP2 has its weights gathered."""
        actor: Any = self.actor
        with keep_gathered(self) if self.config.gather_for_sampling else nullcontext():
            return actor.generate(**options)

    def _judge(self, pack: Pack) -> PolicyOutput:
        hidden = self._hidden(pack) if self._wants_hidden() else None
        logprobs, entropy = logprobs_of(self.actor, self.head, pack, self.config, hidden=hidden)
        states = self._critic_states(pack, hidden)
        return PolicyOutput(
            logprobs, entropy, self.critic(states[pack.logit_positions]), self.critic(states[pack.last])
        )

    def _loss(self, pack: Pack, targets: LossInputs, train_actor: bool) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        with torch.set_grad_enabled(train_actor and torch.is_grad_enabled()):
            hidden = self._hidden(pack) if self._wants_hidden(train_actor) else None
        loss = targets.advantages.new_zeros(())
        stats: dict[str, Tensor] = {}
        if train_actor:
            loss, stats = self._policy_loss(pack, targets, hidden)
        values = ppo.value_loss(
            self.critic(self._critic_states(pack, hidden)[pack.logit_positions]),
            targets.old_values,
            targets.returns,
            clip=config.value_clip,
            **_aggregation(config, pack, targets),
        )
        return loss + config.value_coef * values.loss, {**stats, **values.stats}

    def _policy_loss(self, pack: Pack, t: LossInputs, hidden: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        options: dict[str, Any] = {
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "dual_clip": config.dual_clip,
            "entropy_coef": t.entropy_coef,
            "ref_logprobs": t.ref_logprobs,
            "kl_coef": t.kl_coef if t.ref_logprobs is not None else 0.0,
            "kl_estimator": config.kl_loss_estimator,
            "weights": t.weights,
            **_aggregation(config, pack, t),
        }
        if self.head.linear and hidden is not None:
            layer = head_of(self.actor)
            out = ppo.linear_ppo_loss(
                hidden[pack.logit_positions].to(layer.weight.dtype),
                layer.weight,
                pack.tokens,
                t.old_logprobs,
                t.advantages,
                bias=layer.bias,
                temperature=config.temperature,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
                chunk_bytes=config.chunk_bytes,
                **options,
            )
            return out.loss, out.stats
        logprobs, entropy = logprobs_of(self.actor, self.head, pack, config)
        plain = ppo.policy_loss(logprobs, t.old_logprobs, t.advantages, entropy=entropy, **options)
        return plain.loss, plain.stats

    def _wants_hidden(self, train_actor: bool = True) -> bool:
        return (self.head.linear and train_actor) or self.critic.backbone is None

    def _hidden(self, pack: Pack) -> Tensor:
        return hidden_states(decoder_of(self.actor), pack, self.head)

    def _critic_states(self, pack: Pack, hidden: Tensor | None) -> Tensor:
        """[total, D]: what the value head reads."""
        if self.critic.backbone is not None:
            return hidden_states(self.critic.backbone, pack, self.critic_head)
        assert hidden is not None
        return hidden


def _aggregation(config: PPOConfig, pack: Pack, targets: LossInputs) -> dict[str, Any]:
    options: dict[str, Any] = {
        "aggregation": config.aggregation,
        "denominator": targets.denominator,
        "backend": config.backend,
    }
    if config.aggregation.startswith("seq-"):
        options["cu_seqlens"] = pack.cu_answers
    if config.aggregation == "seq-mean-token-sum-norm":
        options["norm_length"] = float(config.max_new_tokens)
    return options
