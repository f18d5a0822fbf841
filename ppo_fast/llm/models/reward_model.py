"""Reward models: a sequence classifier with one output, loaded from a folder and used as a reward function."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.common.device import to_device, upload
from ppo_fast.common.errors import RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import Prompt, added_ids, chat_text, without_second_begin
from ppo_fast.llm.models.frozen import frozen_dtype_of, store_frozen
from ppo_fast.llm.models.head import input_embedding
from ppo_fast.llm.models.loading import check_embedding
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.models.weights import check_folder, load_structure, load_tokenizer, load_weights


def load_reward_model(
    folder: str | Path, *, weights: bool = True, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen sequence classifier with one output, and its tokenizer, from a folder of `save_pretrained`.

    Without `weights` it is on the meta device, as in `load_actor`. `dtype`: of the weights; None: that of the files.

    Raises:
        UserError: it cannot be loaded, has no scoring layer, or has more than one output.
    """
    what = "reward model"
    check_folder(folder, what)
    tokenizer = load_tokenizer(folder)
    kind = AutoModelForSequenceClassification
    if weights:
        advice = (
            "give a folder of a sequence classifier with one output, trained on preferences, not of a language model"
        )
        model = load_weights(kind, folder, what, advice, dtype=dtype)
    else:
        model = load_structure(kind, folder, what, dtype=dtype)
    if model.config.num_labels != 1:
        raise UserError(f"the reward model in {folder} has {model.config.num_labels} outputs; one score is expected")
    return model.eval().requires_grad_(False), tokenizer


class RewardModel:
    """A sequence classifier with one output as a reward function (Ouyang et al. 2022, section 3.5).

    It encodes prompt and completion with its own tokenizer: through the chat template, as turns of user and assistant,
    where there is one; else one after the other.

    Args:
        model: any AutoModelForSequenceClassification with num_labels = 1.
        tokenizer: its own, not the actor's.
        batch_size: completions scored together.
        max_length: of longer texts the beginning is removed, in tokens; special tokens at both ends are kept. None, or
            more than the model has: the model's positions.
        device: of the model; None: unchanged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise RewardError("the reward model's tokenizer has no pad token; name one of its tokens")
        if model.config.num_labels != 1:
            raise RewardError(f"the reward model has {model.config.num_labels} outputs; one score is expected")
        check_embedding(tokenizer, model, "the reward model")
        model.config.pad_token_id = tokenizer.pad_token_id
        self.model: PreTrainedModel = model.eval() if device is None else to_device(model.eval(), device)
        # a copy: a call with truncation changes a tokenizer, and what save_pretrained writes of it
        self.tokenizer = copy.deepcopy(tokenizer)
        self.batch_size = batch_size
        self.max_length = min((x for x in (max_length, _positions(model)) if x), default=None)
        self.compute_dtype = "float32"  # of autocast; float32: none
        self.__name__ = "reward_model"

    def follow_dtype(self, config: PPOConfig) -> None:
        """Compute in bfloat16 as a run does, with weights stored as its `frozen_dtype` says; the score is in fp32.

        In float16, whose range a model that was trained in bfloat16 may exceed, the model computes as it was loaded.
        """
        store_frozen(self.model, frozen_dtype_of(config))
        if config.dtype == "bfloat16":
            self.compute_dtype = config.dtype
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear) and module.out_features == 1:
                    module.register_forward_hook(_in_fp32)

    @functools.cached_property
    def added_before(self) -> list[int]:
        """Return the tokens that the tokenizer adds before each text."""
        return added_ids(self.tokenizer)[0]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return one score for each completion, minus `config.score_offset` of the model, if it has one."""
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            stop = start + self.batch_size
            scores += self.forward(prompts[start:stop], completions[start:stop]).tolist()
        offset = getattr(self.model.config, "score_offset", 0.0)
        return [x - offset for x in scores]

    def forward(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Compute the scores [B] fp32 of one batch, with a graph."""
        ids = [self._ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        pad = self._padding(ids)
        if pad is None:
            return torch.cat([self._scores([row], -1) for row in ids])
        return self._scores(ids, pad)

    def _padding(self, ids: list[list[int]]) -> int | None:
        """Return a token for padding that none of these texts has; None if there is none.

        A decoder's classifier reads its score at the last token that is not `config.pad_token_id`. Where that is the
        end token, or another token of the text, it would read the score too early.
        """
        used = {token for row in ids for token in row}
        tokens = range(input_embedding(self.model).shape[0])
        return next((token for token in (self.tokenizer.pad_token_id, *tokens) if token not in used), None)

    def _scores(self, ids: list[list[int]], pad: int) -> Tensor:
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        device = self.model.device
        with _pad_token(self.model, pad), autocast(self.compute_dtype, device):
            out = self.model(input_ids=upload(tokens, device), attention_mask=upload(mask, device))
        return out.logits.squeeze(-1).float()

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        tokenizer, limit = self.tokenizer, self.max_length
        if tokenizer.chat_template is not None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = [*asked, {"role": "assistant", "content": completion}]
            text = chat_text(tokenizer, turns, add_generation_prompt=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written its own
            first = len(ids) > 0 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
            return ids if limit is None or len(ids) <= limit else ids[:first] + ids[len(ids) - limit + first :]
        if not isinstance(prompt, str):
            raise RewardError("the prompts are chats, but the reward model's tokenizer has no chat template")
        ids = without_second_begin(tokenizer(prompt + completion)["input_ids"], self.added_before)
        if limit is None or len(ids) <= limit:
            return ids
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
        try:  # the tokenizer knows which special tokens it adds
            return tokenizer(prompt + completion, truncation=True, max_length=limit)["input_ids"]
        finally:
            tokenizer.truncation_side = side


def _in_fp32(layer: torch.nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A forward hook for a linear layer that computes the score, which bfloat16 would round to three digits."""
    assert isinstance(layer, torch.nn.Linear)
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(out.device.type, enabled=False):
        return torch.nn.functional.linear(arguments[0].float(), layer.weight.float(), bias)


def _positions(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that a model accepts; None: any number.

    RoBERTa and its relatives count positions from the one after their padding's.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - skipped)
    return min((x for x in limits if x and x > 0), default=None)


@contextmanager
def _pad_token(model: PreTrainedModel, token: int) -> Iterator[None]:
    """Use `token` for padding inside this block."""
    configs = [model.config, model.config.get_text_config()]
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = token
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config.pad_token_id = own
