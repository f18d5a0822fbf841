"""How a model computes a pack: hidden states or its own logits, from packed rows, padded rows or single sequences.

`HeadInfo` has the choices, which `probe.detect_heads` makes at load.
"""

import functools
import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Union, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import ppo_fast as ppo
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.packing.attention import Layout
from ppo_fast.llm.packing.pack import Pack

if TYPE_CHECKING:
    from peft import PeftModel

# A model of transformers with `generate`, or the PeftModel around one
LanguageModel = Union[PreTrainedModel, "PeftModel"]


@dataclass(frozen=True)
class HeadInfo:
    """How to compute the hidden states and logits of a model."""

    linear: bool  # softcap(logit_scale (h W^T + b)) from its decoder's hidden states; else by its own forward
    packed: bool  # its attention takes packed rows
    softcap: float | None = None
    logit_scale: float = 1.0
    batched: bool = True  # a batch of several sequences gives the values of each alone
    boundaries: tuple[int, ...] = ()  # a sequence of at most this length shares no batch with a longer one

    def regime(self, length: int) -> int:
        """Return the number of boundaries below a length; sequences of one regime may share a batch."""
        return bisect_left(self.boundaries, length)

    def tokens_per_pack(self, budget: int) -> int:
        """Return the most tokens in a pack: the budget, or 1 where each sequence needs its own pack."""
        return budget if self.batched else 1

    def splits(self, lengths: Sequence[int]) -> bool:
        """Check whether sequences of these lengths must not share a batch. Packs of `split_minibatches` never do."""
        return len(lengths) > 1 and (not self.batched or len({self.regime(n) for n in lengths}) > 1)


@dataclass(frozen=True)
class GenerateInfo:
    """How to use the `generate` of an actor, as `detect_generate` has found."""

    left_padding: bool = True  # a batch may hold prompts of different lengths
    cache: bool = True  # keys and values of earlier tokens are kept
    boundaries: tuple[int, ...] = ()  # as those of `HeadInfo`

    def batches(self, lengths: Sequence[int], *, new_tokens: int, size: int) -> list[list[int]]:
        """Group the numbers of prompts of these lengths into batches of at most `size`.

        A sequence that may cross a boundary shares its batch only with those that cross it at the same token.
        """
        alike: dict[tuple[bool, int], list[int]] = {}
        for i, length in enumerate(lengths):
            crosses = any(length <= b < length + new_tokens for b in self.boundaries)
            exact = crosses or not self.left_padding
            alike.setdefault((exact, length if exact else bisect_left(self.boundaries, length)), []).append(i)
        return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside the wrapper of peft."""
    unwrap = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    inner = model if unwrap is None else unwrap()
    assert isinstance(inner, PreTrainedModel)
    return inner


def text_config(model: nn.Module) -> PreTrainedConfig:
    """Return the configuration of the text model: the model's own, or that of a part of a composite one."""
    return unwrap_peft(model).config.get_text_config(decoder=True)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part that computes hidden states: `get_decoder`, or the base model if that is something else.

    Raises:
        UserError: the model has no such part.
    """
    inner = unwrap_peft(model)
    embeddings = _embeddings(inner)
    for part in (inner.get_decoder(), inner.base_model, *inner.children()):
        if isinstance(part, PreTrainedModel) and part is not inner and _embeddings(part) is embeddings:
            return part
    raise UserError(
        f"cannot find the hidden states of this {model_name(model)}: no part of it is a model that shares its"
        " input embeddings"
    )


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def own_generate(model: LanguageModel) -> Callable[..., Tensor]:
    """Return the model's own `generate`, which PreTrainedModel does not declare."""
    return cast(Callable[..., Tensor], model.generate)


class HasEmbeddings(Protocol):
    """A model of transformers, or what passes its methods on: the wrappers of peft and torch.compile, and others."""

    def get_input_embeddings(self) -> nn.Module: ...


def input_embedding(model: nn.Module) -> Tensor:
    """Return the input embedding [V, D]."""
    weight = cast(HasEmbeddings, model).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the LM head, by transformers' name: nn.Linear in most models; None in a model without one."""
    return unwrap_peft(model).get_output_embeddings()


def linear_head_of(model: nn.Module) -> nn.Linear:
    """Return the LM head of a model whose logits are linear in its hidden states (`HeadInfo.linear`)."""
    head = head_of(model)
    assert isinstance(head, nn.Linear)
    return head


def model_name(model: nn.Module) -> str:
    """Return the name of the model's class, without peft."""
    return type(unwrap_peft(model)).__name__


@functools.cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts(model: nn.Module, name: str) -> bool:
    """Check whether the model's forward has an argument of this name."""
    return name in _parameters(type(unwrap_peft(model)).forward)


def without_cache(model: nn.Module) -> dict[str, object]:
    """Return the argument of a forward without a cache; none for a model that never has one, such as GPT-1."""
    known = accepts(model, "use_cache") or hasattr(text_config(model), "use_cache")
    return {"use_cache": False} if known else {}


def hidden_states(decoder: nn.Module, pack: Pack, head: HeadInfo) -> Tensor:
    """Compute the decoder's last hidden states [total, D] of a pack. Packed: inside `packed_attention` only."""
    return _outputs(decoder, pack, head, "last_hidden_state", None)


def model_logits(model: nn.Module, pack: Pack, head: HeadInfo) -> Tensor:
    """Compute the logits [n, V] for the pack's completion tokens by the model's own forward."""
    return _outputs(model, pack, head, "logits", pack.logit_positions)


def _outputs(model: nn.Module, pack: Pack, head: HeadInfo, name: str, tokens: Tensor | None) -> Tensor:
    """Select a tensor of the model's output at the given tokens of a pack, or at all tokens."""
    if head.splits(pack.lengths) or not (head.packed or head.batched):
        each = [getattr(_run_single(model, ids, packed=head.packed), name)[0] for ids in _split(pack)]
        found = torch.cat(each)
    elif head.packed:
        found = getattr(_run_packed(model, pack.input_ids, pack.position_ids, pack.layout), name)[0]
    else:
        rows = padded(pack)
        out = getattr(model(**rows.inputs(), **without_cache(model)), name).flatten(0, 1)
        return out.index_select(0, rows.tokens if tokens is None else rows.tokens[tokens])
    return found if tokens is None else found[tokens]


def _split(pack: Pack) -> list[Tensor]:
    """[1, L] each"""
    return list(pack.input_ids.split(pack.lengths, dim=1))


def _run_single(model: nn.Module, ids: Tensor, *, packed: bool) -> object:
    if not packed:
        return model(input_ids=ids, **without_cache(model))
    position = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return _run_packed(model, ids, position, Layout.from_lengths([ids.shape[1]], ids.device))


def _run_packed(model: nn.Module, ids: Tensor, position: Tensor, layout: Layout) -> object:
    return model(input_ids=ids, position_ids=position, **without_cache(model), **layout.arguments())


class PaddedRows(NamedTuple):
    """A pack's sequences, each in its own row, padded on the right to the longest, L."""

    input_ids: Tensor  # [S, L] int64
    position_ids: Tensor  # [S, L] int64, 0 in the padding
    attention_mask: Tensor  # [S, L] bool
    tokens: Tensor  # [total] int64: where each of the pack's tokens is in the flattened rows

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a model."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask.long(),
        }


def padded(pack: Pack) -> PaddedRows:
    """Convert a pack to padded rows. Its sizes are known on the host, so nothing here waits for a GPU."""
    ends, L = pack.layout.cu_seqlens, pack.layout.longest
    column = torch.arange(L, device=ends.device)
    mask = column < ends.diff().unsqueeze(1)
    row = torch.arange(len(ends) - 1, device=ends.device)
    row = row.repeat_interleave(ends.diff(), output_size=pack.input_ids.shape[1])
    tokens = row * L + pack.position_ids[0]
    ids = pack.input_ids.new_zeros(mask.numel()).index_copy_(0, tokens, pack.input_ids[0]).view(mask.shape)
    return PaddedRows(ids, torch.where(mask, column, 0), mask, tokens)


def head_dtype(config: PPOConfig) -> torch.dtype:
    """Return the dtype to which the LM head rounds the operands of its products, as config.head_dtype says."""
    name = config.dtype if config.head_dtype == "auto" else config.head_dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def logprobs_of(
    model: nn.Module, head: HeadInfo, pack: Pack, config: PPOConfig, *, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log-probability and entropy [n] of the pack's completion tokens, with a graph."""
    if not head.linear:
        logprobs, entropy = ppo.token_logprobs(
            model_logits(model, pack, head),
            pack.tokens,
            temperature=config.temperature,
            with_entropy=True,
            backend=config.backend,
        )
        return logprobs, entropy
    if hidden is None:
        hidden = hidden_states(decoder_of(model), pack, head)
    layer = linear_head_of(model)
    logprobs, entropy = ppo.linear_logprobs(
        hidden[pack.logit_positions],
        layer.weight,
        pack.tokens,
        bias=layer.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=config.temperature,
        with_entropy=True,
        chunk_bytes=config.chunk_bytes,
        compute_dtype=head_dtype(config),
        backend=config.backend,
    )
    return logprobs, entropy
