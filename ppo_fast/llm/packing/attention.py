"""Attention over packed rows: sequences side by side without padding, each attending to itself only.

Inside `packed_attention(model, ...)` a model's attention runs through `packed_attention_forward`, which is registered
with transformers under the name ppo_fast_packed. Outside it the model has its original implementation: sampling, which
needs the padding mask and a cache, never uses the packed one. The boundaries of the sequences are passed through
the model as keyword arguments, not as a global: gradient checkpointing runs the forward again on another thread.

On an NVIDIA GPU in fp16 or bf16 FlashAttention takes the row as it is; `flash.decide` tells which implementation, and
why none. Elsewhere (CPU, fp32, attention sinks) sequences of similar length are attended to in one batch by SDPA, with
the arithmetic of an unpadded model. On a CPU short sequences are attended to in fp32 under autocast, too: PyTorch's
backward pass in bf16 takes eight times as long there (32 sequences of 25 tokens; at 512 tokens both are equal).
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from ppo_fast.common import device as devices
from ppo_fast.llm.packing import flash

NAME = "ppo_fast_packed"

# Softcap and sinks keep at least two such matrices of each layer for backward: at this size a model of 26 layers
# (Gemma 2 2B) keeps 13 GiB of them, half of a GPU with 24.
SCORES_LIMIT_BYTES = 2**28

SHORT = 384  # tokens of sequences up to which a CPU attends in fp32


@dataclass(frozen=True)
class Layout:
    """The boundaries of the sequences of a packed row, and the same sequences as padded batches, the buckets.

    A bucket [S, L] holds sequences of similar length, so that at most half of it is padding. Slots are the positions
    in all buckets, one bucket after the other.
    """

    cu_seqlens: Tensor  # [S + 1] int32
    longest: int
    shapes: tuple[tuple[int, int], ...]  # of the buckets
    token_of_slot: Tensor | None  # [sum of S * L] int64: the token of a slot, at padding the last one; None: in order
    slot_of_token: Tensor  # [total] int64: the slot of each token

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> "Layout":
        """The layout of sequences of these lengths, one after another."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):  # at least half as long as the longest of its group
            groups.setdefault(length.bit_length(), []).append(i)
        shapes, slots, places = [], [], torch.empty(int(ends[-1]), dtype=torch.int64)
        filled = 0
        for group in groups.values():
            last = torch.tensor([lengths[i] - 1 for i in group]).unsqueeze(1)
            column = torch.arange(int(last.max()) + 1)
            tokens = ends[group].unsqueeze(1) + torch.minimum(column, last)
            real = (column <= last).flatten()
            places[tokens.flatten()[real]] = filled + real.nonzero().squeeze(1)
            shapes.append((tokens.shape[0], tokens.shape[1]))
            slots.append(tokens.flatten())
            filled += tokens.numel()
        in_order = filled == len(places) and bool((places == torch.arange(filled)).all())
        return cls(
            cu_seqlens=ends.to(device, torch.int32),
            longest=max(lengths),
            shapes=tuple(shapes),
            token_of_slot=None if in_order else torch.cat(slots).to(device),
            slot_of_token=places.to(device),
        )

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that the model's forward passes on to its attention."""
        return {
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "packed_layout": self,
        }


@contextmanager
def cudnn_attention(*, enabled: bool) -> Iterator[None]:
    """SDPA may use cuDNN inside this block, or may not.

    On GPUs of compute capability 9 and 10 PyTorch prefers cuDNN in half precision, which builds a plan for each new
    shape; lengths change with every pack and with every sampled token. Elsewhere cuDNN is the last choice anyway.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and enabled)  # it stays off where the user has switched it off
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def packed_attention(*models: nn.Module, cudnn: bool = False, compiled: bool = False) -> Iterator[None]:
    """Models attend to packed rows inside this block; backward passes that recompute a forward belong inside, too.

    `compiled`: layers run under torch.compile, which leaves out the attention: it depends on every pack's boundaries.
    """
    AttentionInterface.register(NAME, _not_compiled() if compiled else packed_attention_forward)
    configs = {id(c): c for model in models for c in _configs(model)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = NAME
    try:
        with cudnn_attention(enabled=cudnn):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@functools.cache
def _not_compiled() -> Callable[..., tuple[Tensor, None]]:
    """The attention for models under torch.compile; one object, since another one would compile anew."""
    found: Callable[..., tuple[Tensor, None]] = torch.compiler.disable(packed_attention_forward)
    return found


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            yield config


def copy_configs(model: nn.Module) -> None:
    """Give a model config objects of its own: models built from one object share its attention implementation."""
    memo: dict[int, object] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, memo)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, H, total, d]
    key: Tensor,  # [1, G, total, d], H a multiple of G
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # attention sinks [H]
    packed_layout: Layout | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns [1, total, H, d]."""
    if attention_mask is not None:
        raise ValueError("packed attention met an attention mask: packed rows have no padding")
    if packed_layout is None:
        raise ValueError("packed attention was not told where sequences begin: the model drops keyword arguments")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"packed attention met a cache: {key.shape[2]} keys for {query.shape[2]} queries")
    if getattr(module, "is_causal", True) is not True:
        raise ValueError("packed attention is causal, but this layer is not")
    needs = {"window": sliding_window is not None, "softcap": softcap is not None, "sinks": s_aux is not None}
    decision = flash.decide_and_warn(_request(query, key, value, **needs))
    if decision.path != flash.BUCKETS or query.device.type != "cpu":  # a CPU's dtype depends on the length: _causal
        query, key, value = (x.to(_compute_dtype(query)) for x in (query, key, value))
    if decision.path == flash.BUCKETS:
        out = _by_buckets(
            query,
            key,
            value,
            packed_layout,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        return out.unsqueeze(0), None
    if sliding_window is not None and sliding_window >= packed_layout.longest:
        sliding_window = None  # the kernels without a window are faster
    rows = flash.Rows(
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        cu_seqlens=packed_layout.cu_seqlens,
        longest=packed_layout.longest,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return flash.attend(decision, rows).unsqueeze(0), None


def _request(query: Tensor, key: Tensor, value: Tensor, **needs: bool) -> flash.Request:
    return flash.Request(
        device=query.device,
        dtype=_compute_dtype(query),
        head_size=query.shape[-1],
        value_size=value.shape[-1],
        grouped=query.shape[1] != key.shape[1],
        **needs,
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of autocast where it is on, as in SDPA: rotary embeddings give only queries and keys in fp32."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Context(Protocol):
    token_of_slot: Tensor
    slot_of_token: Tensor


class _ToSlots(torch.autograd.Function):
    """[total, ...] -> [slots, ...]. Padding gets no gradient, so the way back is a plain selection, too."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.slot_of_token = slot_of_token
        return x.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.slot_of_token), None, None


class _FromSlots(torch.autograd.Function):
    """[slots, ...] -> [total, ...], the inverse."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.token_of_slot, ctx.slot_of_token = token_of_slot, slot_of_token
        return x.index_select(0, slot_of_token)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        slots, places = ctx.token_of_slot, ctx.slot_of_token
        if len(slots) == len(places):
            return grad.index_select(0, slots), None, None
        return grad.new_zeros(len(slots), *grad.shape[1:]).index_copy_(0, places, grad), None, None


class _ScoreOptions(TypedDict):
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None


def _by_buckets(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Unpack[_ScoreOptions]) -> Tensor:
    """[total, H, d], a bucket of sequences at a time. Padding is on the right: causal attention never sees it."""
    parts = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [total, heads, d]
    if layout.token_of_slot is not None:
        parts = [_ToSlots.apply(x, layout.token_of_slot, layout.slot_of_token) for x in parts]
    sizes = [S * L for S, L in layout.shapes]
    attended = []
    for bucket, shape in zip(zip(*(x.split(sizes) for x in parts), strict=True), layout.shapes, strict=True):
        heads = (x.unflatten(0, shape).transpose(1, 2) for x in bucket)  # [S, heads, L, d]
        attended.append(_causal(*heads, **options).transpose(1, 2).flatten(0, 1))
    out = torch.cat(attended) if len(attended) > 1 else attended[0]
    return out if layout.token_of_slot is None else _FromSlots.apply(out, layout.token_of_slot, layout.slot_of_token)


def _causal(
    q: Tensor,  # [S, H, L, d]
    k: Tensor,  # [S, G, L, d]
    v: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    L, compute = q.shape[2], _compute_dtype(q)
    scored = softcap is not None or sinks is not None
    exact = q.device.type == "cpu" and L <= SHORT and not scored
    q, k, v = (x.to(torch.promote_types(compute, torch.float32) if exact else compute) for x in (q, k, v))
    band = None
    if sliding_window is not None and sliding_window < L:
        band = torch.ones(L, L, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
    if not scored:
        gqa = q.shape[1] != k.shape[1]
        if gqa and repeats_heads(q, v, masked=band is not None):
            k, v, gqa = _repeat(k, q.shape[1]), _repeat(v, q.shape[1]), False
        with torch.autocast(q.device.type, enabled=False):  # it would cast to bf16
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=gqa
            )
        return out.to(compute)
    _warn_of_scores(q, "attention sinks" if softcap is None else "a softcap")
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(L, L, dtype=torch.bool, device=q.device).tril() if band is None else band
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)], -1)
    p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (p if sinks is None else p[..., :-1]) @ v


def repeats_heads(q: Tensor, v: Tensor, *, masked: bool) -> bool:
    """Whether keys and values get repeated for grouped queries [S, H, L, d] in SDPA.

    On a GPU only its flash kernel is sure to take grouped queries as they are: half precision, no mask, compute
    capability 8.0, one head size up to 256. For others PyTorch falls back to the math kernel, which holds all scores
    [S, H, L, L], where the memory-efficient kernel needs only the repeated keys and values.
    """
    if q.device.type == "cpu":
        return False
    capability = devices.compute_capability(q.device)
    half = q.dtype in (torch.float16, torch.bfloat16)
    flash_takes_it = half and not masked and q.shape[-1] == v.shape[-1] <= flash.MAX_HEAD_SIZE
    return not flash_takes_it or (capability is not None and capability < (8, 0))


def _repeat(x: Tensor, heads: int) -> Tensor:
    """[S, G, L, d] -> [S, heads, L, d]"""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _warn_of_scores(q: Tensor, feature: str) -> None:
    S, H, L, _ = q.shape
    size = S * H * L * L * 4  # softmax in fp32
    if size > SCORES_LIMIT_BYTES:
        remedy = "lower micro_batch_tokens or max_new_tokens, or use --gradient-checkpointing"
        if feature == "a softcap" and q.device.type != "cpu":
            remedy += ", or install flash-attn 2.6 or newer"
        flash.warn_once(
            f"attention with {feature} holds all scores: {size / 2**30:.1f} GiB for each matrix of each layer"
            f" ({S} sequences of {L} tokens, {H} heads); {remedy}",
            key=f"scores with {feature}",
        )
