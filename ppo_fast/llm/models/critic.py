"""The critic: a value head on hidden states, of a backbone of its own or of the actor."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.llm.models.head import decoder_of, input_embedding, without_cache


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

    The head starts at zero (openai/lm-human-preferences): the first values are 0 instead of noise.
    """

    def __init__(self, backbone: nn.Module | None, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

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
        """[n, D] hidden states -> [n] values. In fp32 under autocast, too: returns are regressed on them."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
