"""From an actor to log-probabilities without the logits: what its LM head does, decided by a probe at load.

The probe compares the logits of the model's own forward with softcap(logit_scale (h W^T + b)) from its decoder's
hidden states, first padded, then packed. A model that differs (LoRA on the head, an unknown head) keeps its own
logits, and one whose attention does not take packed rows is run on padded ones, each with one warning.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.attention import Layout, packed_attention
from ppo_fast.errors import UserError
from ppo_fast.packing import Pack

PROBE_LENGTHS = (5, 3, 1)


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


@torch.no_grad()
def probe(model: Any, *, strict: bool = False) -> Head:
    """Finds out how the model's logits can be computed. With `strict` an error takes the place of a warning."""
    config = bare(model).config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1 / scaling if scaling else getattr(config, "logit_scale", None) or 1.0
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(sum(PROBE_LENGTHS), device=device) * 7919 + 1) % vocabulary
    rows = [part.unsqueeze(0) for part in ids.split(PROBE_LENGTHS)]
    own = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
    reason = _why_not_linear(model, rows, own, softcap, scale)
    if reason is not None:
        _complain(f"{reason}: log-probabilities come from the model's own logits, which takes more memory", strict)
    linear = reason is None
    head = Head(linear=linear, packed=True, softcap=softcap if linear else None, logit_scale=scale if linear else 1.0)
    reason = _why_not_packed(model, ids, own)
    if reason is not None:
        _complain(f"{reason}: it learns from padded rows, which takes more time", strict)
        head = Head(linear=linear, packed=False, softcap=head.softcap, logit_scale=head.logit_scale)
    return head


def _complain(reason: str, strict: bool) -> None:
    if strict:
        raise UserError(f"{reason} (strict = true makes this an error)")
    warnings.warn(reason, stacklevel=4)


def _differ(a: Tensor, b: Tensor) -> bool:
    """More than rounding: logits of one formula in two orders of summation."""
    bound = 64 * torch.finfo(a.dtype).eps * (1 + b.float().abs().max())
    return not bool((a.float() - b.float()).abs().max() <= bound)


def _why_not_linear(
    model: nn.Module, rows: list[Tensor], own: Tensor, softcap: float | None, scale: float
) -> str | None:
    name, head = type(bare(model)).__name__, head_of(model)
    if type(head) is not nn.Linear:
        return f"the LM head of this {name} is a {type(head).__name__}, not a plain linear layer"
    try:
        hidden = torch.cat([decoder_of(model)(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])
        logits = head(hidden).float() * scale
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return f"the hidden states of this {name} do not fit its LM head ({str(error).splitlines()[0]})"
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.shape != own.shape or _differ(logits.to(own.dtype), own):
        return f"the logits of this {name} are not its LM head times its hidden states"
    return None


def _why_not_packed(model: nn.Module, ids: Tensor, own: Tensor) -> str | None:
    position = torch.cat([torch.arange(n, device=ids.device) for n in PROBE_LENGTHS]).unsqueeze(0)
    layout = Layout.of(list(PROBE_LENGTHS), ids.device)
    name = type(bare(model)).__name__
    try:
        with packed_attention(model):
            out = model(input_ids=ids.unsqueeze(0), position_ids=position, use_cache=False, **layout.arguments())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"this {name} does not take packed rows ({str(error).splitlines()[0]})"
    if _differ(out.logits[0], own):
        return f"this {name} gives other logits on packed rows than one by one"
    return None


def hidden_states(decoder: nn.Module, pack: Pack, *, packed: bool) -> Tensor:
    """[total, D]: the decoder's last hidden states of a pack's tokens. Packed: inside `packed_attention` only."""
    if packed:
        return _run(decoder, pack).last_hidden_state[0]
    ids, positions, mask = padded(pack)
    out = decoder(input_ids=ids, position_ids=positions, attention_mask=mask.long(), use_cache=False)
    return out.last_hidden_state[mask]


def own_logits(model: nn.Module, pack: Pack, *, packed: bool) -> Tensor:
    """[n, V]: the logits from which the pack's answer tokens are drawn, by the model's own forward."""
    if packed:
        return _run(model, pack).logits[0, pack.states]
    ids, positions, mask = padded(pack)
    out = model(input_ids=ids, position_ids=positions, attention_mask=mask.long(), use_cache=False)
    return out.logits[mask][pack.states]


def _run(model: nn.Module, pack: Pack) -> Any:
    return model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False, **pack.layout.arguments())


def padded(pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    """A pack's tokens and positions, each sequence in a row of its own, padded on the right; and where tokens are."""
    lengths = pack.layout.cu_seqlens.diff()
    column = torch.arange(pack.layout.longest, device=lengths.device)
    mask = column < lengths.unsqueeze(1)
    ids = pack.input_ids.new_zeros(mask.shape).masked_scatter(mask, pack.input_ids)
    return ids, torch.where(mask, column, 0), mask
