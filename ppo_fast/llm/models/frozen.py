"""Frozen weights in bfloat16: half the memory, and under autocast in it the same numbers.

The weights of plain linear layers are stored so, which autocast would cast for each product. Embeddings and the LM
head (often the embedding), which it would not, are stored where no value changes: those of a model that was saved in
bfloat16. Norms, biases and experts (whose weights are no linear layers) keep their dtype. Without autocast a layer
widens its weight while it is used, in forward and again in backward.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.head import head_of, input_embedding, model_name, without_cache

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _WideLinear(torch.autograd.Function):
    """x W^T + b with a frozen W that is narrower than x. Only the narrow W is kept for backward."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        to_x, _, to_bias = ctx.needs_input_grad
        return grad @ weight.to(grad.dtype) if to_x else None, None, grad.flatten(0, -2).sum(0) if to_bias else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, bias)
    return _WideLinear.apply(x, weight, bias)


class StoredLinear(nn.Linear):
    """nn.Linear with a frozen weight in another dtype than that of the computation."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class StoredConv1D(Conv1D):
    """transformers' Conv1D, a linear layer whose weight is [in, out], with a frozen weight in another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _WideLinear.apply(x, self.weight.T, self.bias)


class StoredEmbedding(nn.Embedding):
    """nn.Embedding with a frozen weight in another dtype; the rows that it looks up are fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def is_plain_linear(layer: nn.Module | None) -> "TypeIs[nn.Linear]":
    """Check whether a layer is nn.Linear itself, whatever dtype its weight is stored in, and no subclass."""
    return type(layer) in (nn.Linear, StoredLinear)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    Conv1D: StoredConv1D,
    nn.Embedding: StoredEmbedding,
}
STORED = {stored: plain for plain, stored in PLAIN.items()}


def frozen_dtype_of(config: PPOConfig) -> torch.dtype | None:
    """Return the dtype in which a run stores the frozen weights of linear layers; None: as they are.

    >>> frozen_dtype_of(PPOConfig(dtype="bfloat16"))
    torch.bfloat16
    >>> frozen_dtype_of(PPOConfig(dtype="float32"))
    """
    asked = config.dtype if config.frozen_dtype == "auto" else config.frozen_dtype
    return torch.bfloat16 if asked == "bfloat16" else None


def _exact_only(model: nn.Module) -> set[Tensor]:
    """The weights that are not rounded: embeddings and the LM head, and linear layers with one output, the score."""
    found: set[Tensor] = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found |= {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1}
    head = head_of(model)
    found.update([] if head is None else head.parameters())
    return found


def _has_values_in(weight: Tensor, dtype: torch.dtype) -> bool:
    """Check whether all values of a weight are values of a dtype; one on the meta device has none."""
    return not weight.is_meta and torch.equal(weight.to(dtype).to(weight.dtype), weight)


def _frozen_layers(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The plain layers that are not trained, without those of adapters, whose weights can be stored in a dtype."""
    adapters = set(getattr(model, "peft_config", {}))
    tied = {p for m in model.modules() if type(m) not in PLAIN for p in m.parameters(recurse=False)}
    exact_only = {weight for weight in _exact_only(model) if not weight.requires_grad}
    exact = {weight: weight not in tied and _has_values_in(weight, dtype) for weight in exact_only}
    for name, module in model.named_modules():
        if type(module) in PLAIN and not adapters & set(name.split(".")):
            weight = module.weight
            assert isinstance(weight, Tensor)
            if weight.dtype == torch.float32 and not weight.requires_grad and exact.get(weight, True):
                yield module


@torch.no_grad()
def store_frozen(model: nn.Module, dtype: torch.dtype | None) -> bool:
    """Store the frozen weights of a model's layers in a dtype, one after the other; None: as they are.

    Tied weights stay tied. Returns whether any value was rounded.
    """
    if dtype is None:
        return False
    narrow: dict[Tensor, nn.Parameter] = {}
    rounded = False
    for module in list(_frozen_layers(model, dtype)):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight not in narrow:
            narrow[weight] = nn.Parameter(weight.to(dtype), requires_grad=False)
            rounded = rounded or not (weight.is_meta or _has_values_in(weight, dtype))
        module.weight = narrow[weight]
        module.__class__ = PLAIN[type(module)]
    return rounded


@torch.no_grad()
def check_widened(model: nn.Module) -> None:
    """Reject a model that cannot compute without autocast on weights that `store_frozen` has changed.

    Raises:
        UserError: a layer of it reads the weights of another (Mamba).
    """
    if not is_stored(model) or not has_weights(model):
        return
    ids = torch.zeros(1, 4, dtype=torch.int64, device=input_embedding(model).device)
    try:
        model.eval()(input_ids=ids, **without_cache(model))  # without dropout, which would draw random numbers
    except RuntimeError as error:
        raise UserError(
            f"frozen_dtype = bfloat16 does not work for this {model_name(model)}, which reads the weights of its linear"
            f" layers by other ways ({first_line(error)}): leave it out"
        ) from error


def is_stored(model: nn.Module) -> bool:
    """Check whether `store_frozen` has changed a layer of the model."""
    return any(type(module) in STORED for module in model.modules())


@torch.no_grad()
def widen_frozen(model: nn.Module) -> None:
    """Undo `store_frozen`, but for the rounding."""
    wide: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        if type(module) in STORED:
            weight = module.weight
            assert isinstance(weight, Tensor)
            module.weight = wide.setdefault(weight, nn.Parameter(weight.float(), requires_grad=False))
            module.__class__ = STORED[type(module)]
