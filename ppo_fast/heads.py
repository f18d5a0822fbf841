"""From an actor to log-probabilities without the logits: what its LM head does, decided by a probe at load.

The probe compares the logits of the model's own forward with softcap(logit_scale (h W^T + b)) from its decoder's
hidden states, first padded, then packed. A model that differs (LoRA on the head, an unknown head) keeps its own
logits, and one whose attention does not take packed rows is run on padded ones, each with one warning.

Packed rows are compared in the model's own precision, and then, where the run's precision takes a fast path of
attention, that path with SDPA by buckets. A fast path that fails is given up for the next one, not for padded rows.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast import flash
from ppo_fast.attention import Layout, packed_attention
from ppo_fast.errors import UserError
from ppo_fast.flash_calls import first_line
from ppo_fast.packing import Pack

PROBE_LENGTHS = (5, 3, 1)

# Bounds for logits of one formula in two orders of summation, in units of what they change when each entry of the
# embeddings changes by one unit in the last place. Two orders differ by 0.2 to 1.3 of it (Llama and GPT-2 of 24 to 96
# layers in fp32 on a CPU), however deep the model is; attention that leaks from one sequence to the next differs by
# more than 100000 of it in fp32 and by 7 to 300 in half precision.
FP32_BOUND, HALF_BOUND = 32, 4

CALL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Head:
    """How an actor's logits come about."""

    linear: bool  # softcap(logit_scale (h W^T + b)) from its decoder's hidden states; else by its own forward
    packed: bool  # its attention takes packed rows
    softcap: float | None = None
    logit_scale: float = 1.0


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without what peft has put around it."""
    unwrap: Any = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    inner = model if unwrap is None else unwrap()
    assert isinstance(inner, PreTrainedModel)
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The part that ends in hidden states."""
    return bare(model).get_decoder()


def head_of(model: nn.Module) -> Any:
    """The LM head, by transformers' name: nn.Linear in most models."""
    return bare(model).get_output_embeddings()


def _name(model: nn.Module) -> str:
    return type(bare(model)).__name__


@torch.no_grad()
def probe(
    model: Any,
    *others: nn.Module | None,
    strict: bool = False,
    dtype: str = "float32",
    device: torch.device | None = None,
) -> Head:
    """Finds out how the model's logits can be computed, and which attention a run takes.

    Args:
        model: the actor.
        others: models that get the same packs: the critic's backbone, the reference. Packed rows need all of them.
        strict: raise UserError instead of a warning.
        dtype: of the run's autocast; float32: none.
        device: where the run computes, if the models are not there yet.
    """
    flash.reset()
    head = probe_head(model, strict=strict)
    with _exact_products():
        for each in (model, *(x for x in others if x is not None)):
            reason = _why_not_packed(each, torch.bfloat16 if dtype == "bfloat16" else None, device)
            if reason is not None:
                _complain(f"{reason}: it learns from padded rows, which takes more time", strict)
                return head
    return dataclasses.replace(head, packed=True)


@torch.no_grad()
def probe_head(model: Any, *, strict: bool = False) -> Head:
    """Finds out how the model's logits can be computed, for rows that are not packed: attention is not asked for, and
    what `probe` found of a run's attention stays."""
    with _exact_products():
        _, rows = _probe_input(model)
        own = _one_by_one(model, rows)
        return _linear_head(model, rows, own, rounding_bound(model, rows, own), strict)


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products without TF32 or bf16, whatever the user has set: the comparison is of fp32 with fp32."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [x.fp32_precision for x in settings]
    # PyTorch has two interfaces to this setting, and raises an error where one is read that differs from the other
    older = _older_precision()
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for x in settings:
        x.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for x, precision in zip(settings, before, strict=True):
            x.fp32_precision = precision


def _older_precision() -> str | None:
    """What the older interface has been set to; None if only the newer one has been used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _complain(reason: str, strict: bool) -> None:
    if strict:
        raise UserError(f"{reason} (strict = true makes this an error)")
    warnings.warn(reason, stacklevel=4)


def _linear_head(model: Any, rows: list[Tensor], own: Tensor, bound: float, strict: bool) -> Head:
    config = bare(model).config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    reason = _why_not_linear(model, rows, own, bound, softcap, scale)
    if reason is None:
        return Head(linear=True, packed=False, softcap=softcap, logit_scale=scale)
    _complain(f"{reason}: log-probabilities come from the model's own logits, which takes more memory", strict)
    return Head(linear=False, packed=False)


def _probe_input(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Token ids, and the same as rows of PROBE_LENGTHS."""
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(sum(PROBE_LENGTHS), device=weight.device) * 7919 + 1) % weight.shape[0]
    return ids, [part.unsqueeze(0) for part in ids.split(PROBE_LENGTHS)]


def _read(out: Any) -> Tensor:
    """Logits, or the hidden states of a model without a head."""
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0]


def _one_by_one(model: nn.Module, rows: list[Tensor]) -> Tensor:
    return torch.cat([_read(model(input_ids=row, use_cache=False)) for row in rows])


def rounding_bound(model: Any, rows: list[Tensor], own: Tensor) -> float:
    """How far two orders of summation may take the model's output apart: see FP32_BOUND.

    Products of 9 rows and of 5, 3 and 1 run through different kernels, and each layer passes on the rounding of those
    before it. Neither depth nor width tells by how much; the model itself does.
    """
    kind = own.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own.dtype
    eps = torch.finfo(computed).eps

    def nudge(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(out.numel(), device=out.device).view(out.shape) * 2654435761 // 128 % 2)
        return out * (1 + eps * sign.to(out.dtype))

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        moved = (_one_by_one(model, rows).float() - own.float()).abs().max().item()
    finally:
        hook.remove()
    factor = FP32_BOUND if computed == torch.float32 else HALF_BOUND
    return factor * moved + 2 * eps * own.float().abs().max().item()


def _differ(a: Tensor, b: Tensor, bound: float) -> bool:
    return not bool((a.float() - b.float()).abs().max() <= bound)  # a NaN differs


def _why_not_linear(
    model: nn.Module, rows: list[Tensor], own: Tensor, bound: float, softcap: float | None, scale: float
) -> str | None:
    name, head = _name(model), head_of(model)
    if type(head) is not nn.Linear:
        return f"the LM head of this {name} is a {type(head).__name__}, not a plain linear layer"
    try:
        hidden = torch.cat([decoder_of(model)(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])
        logits = head(hidden).float() * scale
    except CALL_ERRORS as error:
        return f"the hidden states of this {name} do not fit its LM head ({first_line(error)})"
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.shape != own.shape or _differ(logits.to(own.dtype), own, bound):
        return f"the logits of this {name} are not its LM head times its hidden states"
    return None


def _why_not_packed(model: Any, autocast: torch.dtype | None, device: torch.device | None) -> str | None:
    """Why the model does not take packed rows; None if it does, by whichever path of attention."""
    flash.clear_decisions()
    ids, rows = _probe_input(model)
    own = _one_by_one(model, rows)
    bound = rounding_bound(model, rows, own)
    reason = _packed_differs(model, ids, own, bound)
    while reason is not None and flash.reject(reason):
        reason = _packed_differs(model, ids, own, bound)
    if reason is not None:
        return reason
    run = [dataclasses.replace(x, dtype=autocast or x.dtype, device=device or x.device) for x in flash.requests()]
    decisions = [flash.decide_and_warn(x) for x in run]
    if autocast is None or all(x.path == flash.BUCKETS for x in decisions) or device not in (None, ids.device):
        return None
    with torch.autocast(ids.device.type, dtype=autocast):
        return _autocast_differs(model, ids, rows)


def _autocast_differs(model: Any, ids: Tensor, rows: list[Tensor]) -> str | None:
    """Compares the fast path with buckets, inside autocast; None if it, or the one that takes over, is right."""
    bound = rounding_bound(model, rows, _one_by_one(model, rows))
    try:
        with flash.buckets_only():
            slow = _run_packed(model, ids)
    except CALL_ERRORS as error:
        return f"this {_name(model)} does not take packed rows under autocast ({first_line(error)})"
    reason = _packed_differs(model, ids, slow, bound)
    while reason is not None and flash.reject(reason):
        reason = _packed_differs(model, ids, slow, bound)
    return reason


def _packed_differs(model: nn.Module, ids: Tensor, expected: Tensor, bound: float) -> str | None:
    try:
        out = _run_packed(model, ids)
    except CALL_ERRORS as error:
        return f"this {_name(model)} does not take packed rows ({first_line(error)})"
    if _differ(out, expected, bound):
        what = "hidden states" if head_of(model) is None else "logits"
        return f"this {_name(model)} gives other {what} on packed rows than one by one"
    return None


def _run_packed(model: nn.Module, ids: Tensor) -> Tensor:
    position = torch.cat([torch.arange(n, device=ids.device) for n in PROBE_LENGTHS]).unsqueeze(0)
    layout = Layout.of(list(PROBE_LENGTHS), ids.device)
    with packed_attention(model):
        out = model(input_ids=ids.unsqueeze(0), position_ids=position, use_cache=False, **layout.arguments())
    return _read(out)


def hidden_states(decoder: nn.Module, pack: Pack, *, packed: bool) -> Tensor:
    """[total, D]: the decoder's last hidden states of a pack's tokens. Packed: inside `packed_attention` only."""
    if packed:
        return _run(decoder, pack).last_hidden_state[0]
    rows = padded(pack)
    out = decoder(**rows.inputs())
    return out.last_hidden_state.flatten(0, 1).index_select(0, rows.tokens)


def own_logits(model: nn.Module, pack: Pack, *, packed: bool) -> Tensor:
    """[n, V]: the logits from which the pack's answer tokens are drawn, by the model's own forward."""
    if packed:
        return _run(model, pack).logits[0, pack.states]
    rows = padded(pack)
    logits = model(**rows.inputs()).logits
    return logits.flatten(0, 1).index_select(0, rows.tokens[pack.states])


def _run(model: nn.Module, pack: Pack) -> Any:
    return model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False, **pack.layout.arguments())


class PaddedRows(NamedTuple):
    """A pack's sequences, each in a row of its own, padded on the right to the longest, L."""

    input_ids: Tensor  # [S, L] int64
    position_ids: Tensor  # [S, L] int64, 0 in the padding
    attention_mask: Tensor  # [S, L] bool
    tokens: Tensor  # [total] int64: where each of the pack's tokens is in the flattened rows

    def inputs(self) -> dict[str, Any]:
        """Arguments of a model."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask.long(),
            "use_cache": False,
        }


def padded(pack: Pack) -> PaddedRows:
    """The pack as padded rows. Its sizes are known on the host, so nothing here waits for a GPU."""
    ends, L = pack.layout.cu_seqlens, pack.layout.longest
    column = torch.arange(L, device=ends.device)
    mask = column < ends.diff().unsqueeze(1)
    row = torch.arange(len(ends) - 1, device=ends.device)
    row = row.repeat_interleave(ends.diff(), output_size=pack.input_ids.shape[1])
    tokens = row * L + pack.position_ids[0]
    ids = pack.input_ids.new_zeros(mask.numel()).index_copy_(0, tokens, pack.input_ids[0]).view(mask.shape)
    return PaddedRows(ids, torch.where(mask, column, 0), mask, tokens)
