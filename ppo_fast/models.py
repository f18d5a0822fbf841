"""The four models of PPO on transformers: the actor, its critic, the frozen reference, and what they compute per
token."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import ppo_fast as ppo
from ppo_fast.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device an option names; "auto" is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """transformers without its progress bars: a run has one of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_actor(folder: str | Path, *, pad_token: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32 and its tokenizer, from a folder that `save_pretrained` wrote.

    `pad_token` names a token of the vocabulary for padding where the tokenizer has none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no model in {folder}: it has no config.json; give a folder that save_pretrained wrote")
    try:
        with no_loading_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            actor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the model in {folder}: {str(error).splitlines()[0]}") from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"the pad token {pad_token!r} is not in the vocabulary of the tokenizer in {folder}")
        tokenizer.pad_token = pad_token
    return actor, tokenizer


def _embedding(model: PreTrainedModel) -> Tensor:
    """The input embedding [V, D]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, actor: PreTrainedModel) -> None:
    """Refuses what would fail deep inside a step: no pad token, no end token, ids beyond the embedding."""
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no pad token; name one of its tokens (tokenizer.pad_token = ..., or --pad-token on the"
            " command line; the end token will do)"
        )
    if not end_tokens(tokenizer, actor):
        raise UserError("neither the tokenizer nor the generation config has an end token, so no answer could end")
    rows = _embedding(actor).shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding has {rows} rows: they do not belong"
            " together, or model.resize_token_embeddings(len(tokenizer)) is missing"
        )


def end_tokens(tokenizer: PreTrainedTokenizerBase, actor: PreTrainedModel) -> list[int]:
    """Ids of the tokens that end an answer: the generation config's and the tokenizer's."""
    configured = actor.generation_config.eos_token_id if actor.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


class Critic(nn.Module):
    """V(s) of each prefix: a backbone without LM head and a linear value head that starts at zero.

    The zero start (openai/lm-human-preferences) makes the first values 0 instead of noise.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(_embedding(backbone).shape[1], 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_actor(cls, actor: PreTrainedModel) -> "Critic":
        """A critic whose backbone starts as a copy of the actor's."""
        return cls(copy.deepcopy(actor.get_decoder())).to(actor.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, answer_width: int) -> Tensor:
        """Values [B, T] of the states in which the T answer tokens were chosen, fp32."""
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        before_answer = states.last_hidden_state[:, -answer_width - 1 : -1]
        return self.head(before_answer.to(self.head.weight.dtype)).squeeze(-1).float()


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that never trains: the reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def answer_logprobs(
    actor: PreTrainedModel,
    input_ids: Tensor,  # [B, P + T]
    attention_mask: Tensor,  # [B, P + T]
    position_ids: Tensor,  # [B, P + T]
    answer_mask: Tensor,  # [B, T]
    *,
    temperature: float,
    backend: ppo.ops.Backend,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, T] of the answer tokens at the sampling temperature."""
    T = answer_mask.shape[1]
    logits = actor(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=T + 1,
    ).logits
    logprobs, entropy = ppo.token_logprobs(
        logits[:, -T - 1 : -1],
        input_ids[:, -T:],
        answer_mask,
        temperature=temperature,
        with_entropy=True,
        backend=backend,
    )
    return logprobs, entropy
