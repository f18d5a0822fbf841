"""The critic: a value head on hidden states, of a backbone of its own or of the actor."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.llm.models.head import decoder_of, input_embedding, without_cache
from ppo_fast.llm.sharding import local_part


def hidden_size_of(decoder: nn.Module) -> int:
    """The size of a decoder's hidden states. It may differ from that of the embeddings (RemBERT, Reformer), which is
    taken for a model without weights."""
    weight = input_embedding(decoder)
    if not has_weights(decoder):
        return weight.shape[1]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
    with torch.no_grad():
        return decoder(input_ids=ids, **without_cache(decoder)).last_hidden_state.shape[-1]


class Critic(nn.Module):
    """V(s) of each prefix: a linear value head on hidden states, of its own backbone or, without one, of the actor's.

    V = value_mean + value_std v in units of the reward, where the head predicts v = w h + b (van Hasselt et al. 2016,
    "Learning values across many orders of magnitude", PopArt). The two numbers are buffers; a run moves them with
    `rescale`, and a critic without a scale of its own has 0 and 1: its head predicts V.

    The head starts at zero (openai/lm-human-preferences): the first values are equal instead of noise.
    """

    value_mean: Tensor  # 0-dim fp32
    value_std: Tensor  # 0-dim fp32, > 0

    def __init__(self, backbone: nn.Module | None, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("value_mean", torch.tensor(0.0))
        self.register_buffer("value_std", torch.tensor(1.0))

    @classmethod
    def from_actor(cls, actor: nn.Module) -> "Critic":
        """A critic whose backbone starts as a copy of the actor's."""
        return cls(copy.deepcopy(decoder_of(actor)), hidden_size_of(decoder_of(actor))).to(
            input_embedding(actor).device
        )

    @classmethod
    def shared(cls, actor: nn.Module) -> "Critic":
        """A value head alone: it reads the actor's hidden states, and its loss trains the actor's backbone, too."""
        return cls(None, hidden_size_of(decoder_of(actor))).to(input_embedding(actor).device)

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel, *, keep_head: bool = True) -> "Critic":
        """A critic that starts as a reward model: its backbone, and its scoring layer as the value head, calibrated as
        `preferences.calibrate` left it.

        The backbone is that of the model, not a copy; in half precision it is a copy in fp32, since it is trained.
        """
        if getattr(model, "is_quantized", False):
            raise UserError("the reward model that the critic starts from is quantised: give one that is not")
        backbone: nn.Module = model.base_model
        if any(p.dtype != torch.float32 for p in backbone.parameters()):
            backbone = copy.deepcopy(backbone).float()
        critic = cls(backbone, hidden_size_of(backbone)).to(input_embedding(model).device)
        score = getattr(model, "score", None)
        if keep_head and isinstance(score, nn.Linear) and score.out_features == 1:
            with torch.no_grad():
                critic.head.weight.copy_(score.weight)
                if score.bias is not None:
                    critic.head.bias.copy_(score.bias)
                critic.head.bias.sub_(getattr(model.config, "score_offset", 0.0))
        return critic.requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, D] hidden states -> [n] values V in units of the reward, fp32 under autocast, too."""
        return self.denormalize(self.normalized(hidden))

    def normalized(self, hidden: Tensor) -> Tensor:
        """[n, D] hidden states -> [n] outputs v of the head, fp32 under autocast, too: returns are regressed on it."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def normalize(self, values: Tensor) -> Tensor:
        """Convert values or returns from units of the reward to those of the head: (V - value_mean) / value_std."""
        return (values - self.value_mean) / self.value_std

    def denormalize(self, outputs: Tensor) -> Tensor:
        """Convert outputs of the head to units of the reward: value_mean + value_std v."""
        return self.value_mean + self.value_std * outputs

    @torch.no_grad()
    def rescale(self, mean: float | Tensor, std: float | Tensor) -> Tensor:
        """Change value_mean and value_std (mu', sigma'), and the head so that no value V changes; return the factor k.

        w' = k w and b' = k b + (mu - mu') / sigma' with k = sigma / sigma', a device scalar. A sharded head (FSDP2)
        must be in its shards; all processes give the same numbers.
        """
        before_mean, before_std = self.value_mean.clone(), self.value_std.clone()
        self.value_mean.copy_(torch.as_tensor(mean))
        self.value_std.copy_(torch.as_tensor(std))
        factor = before_std / self.value_std
        local_part(self.head.weight).mul_(factor)
        local_part(self.head.bias).mul_(factor).add_((before_mean - self.value_mean) / self.value_std)
        return factor
