"""Modes of computation: gradient checkpointing without dropout, autocast, and models on their device."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_fast.common.device import has_weights
from ppo_fast.llm.models.frozen import is_plain_linear
from ppo_fast.llm.models.head import head_of, model_name
from ppo_fast.llm.packing.attention import copy_configs
from ppo_fast.ops.linear import head_logits, operand_of_head


class RecomputedLayer(Protocol):
    """A layer of a model whose `gradient_checkpointing_enable` has been called."""

    training: bool
    _gradient_checkpointing_func: Callable[..., object]


def recomputed_layers(model: nn.Module) -> list[RecomputedLayer]:
    """The layers that gradient checkpointing recomputes: those of models that support it."""
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.supports_gradient_checkpointing]
    layers = {id(m): m for part in models for m in part.modules() if isinstance(m, GradientCheckpointingLayer)}
    return [cast(RecomputedLayer, layer) for layer in layers.values()]  # transformers does not declare the function


def warn_if_not_recomputed(*models: nn.Module | None) -> None:
    """Warn once of models for which gradient checkpointing does nothing."""
    without = [model_name(model) for model in models if model is not None and not recomputed_layers(model)]
    if without:
        warnings.warn(
            f"gradient_checkpointing does nothing for {' and '.join(without)}: no layer of such a model supports it, so"
            " the run needs as much memory as without it",
            stacklevel=2,
        )


def _in_evaluation_mode(layer: RecomputedLayer, checkpoint: Callable[..., object]) -> Callable[..., object]:
    """A checkpoint function whose layer runs in evaluation mode, both in forward and when it is recomputed."""

    def run(function: Callable[..., object], *arguments: object) -> object:
        def quiet(*given: object) -> object:
            before, layer.training = layer.training, False
            try:
                return function(*given)
            finally:
                layer.training = before

        return checkpoint(quiet, *arguments)

    return run


@contextmanager
def gradient_checkpointing(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Recompute the forward of layers in backward, inside this block.

    transformers does so for layers in training mode. A layer has that mode only until its forward begins: dropout stays
    off, also where a layer calls it as a function of its own mode. Sampling, outside the block, keeps its cache.
    """
    layers = recomputed_layers(model) if enabled else []
    if layers:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                # transformers 5.2x renamed it
                switch = getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)
                switch({"use_reentrant": False})
    for layer in layers:
        layer._gradient_checkpointing_func = _in_evaluation_mode(layer, layer._gradient_checkpointing_func)
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _layers_of(*models: nn.Module) -> set[nn.Module]:
    return {m for model in models for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}


def warn_if_not_compiled(*models: nn.Module | None, packed: Iterable[nn.Module]) -> None:
    """Warn once of models for which compile_layers does nothing: those that take no packed rows are not compiled."""
    compiled = _layers_of(*packed)
    without = [model_name(model) for model in models if model is not None and not compiled & _layers_of(model)]
    if without:
        warnings.warn(
            f"compile_layers does nothing for {' and '.join(without)}: such a model takes no packed rows, or has no"
            " layers of the class GradientCheckpointingLayer, so the run is as fast as without it",
            stacklevel=2,
        )


@functools.cache
def _compiled_call() -> Callable[..., object]:
    """The call of a module under torch.compile; one object, since another one would compile anew."""
    call: Callable[..., object] = torch.compile(nn.Module._call_impl, dynamic=True)
    return call


@contextmanager
def compiled_layers(*models: nn.Module, enabled: bool) -> Iterator[None]:
    """The layers of models run under torch.compile inside this block. Sampling, outside it, does not.

    All layers of a kind share their compiled code, and it takes packs of any length. The operations between the matrix
    products become a few loops (bench/NOTES.md: SmolLM2-135M on a CPU with AMX, in bf16 and fp32).
    """
    layers = _layers_of(*models) if enabled else set()
    for layer in layers:
        layer._compiled_call_impl = functools.partial(_compiled_call(), layer)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def autocast_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of autocast for an option `dtype`; None for float32, which needs none."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 or fp16, or nothing."""
    half = autocast_dtype(dtype)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None)


@contextmanager
def head_in(model: nn.Module, dtype: torch.dtype, *, keep: bool) -> Iterator[None]:
    """The LM head of a model computes its logits inside this block as `linear_ppo_loss` does: in fp32 from operands in
    `dtype`, instead of in the dtype of autocast.

    Args:
        model: one whose LM head is a plain linear layer; others stay as they are.
        dtype: of the operands.
        keep: convert the weight once for the whole block, in which it must not change.
    """
    layer = head_of(model)
    if not is_plain_linear(layer):
        yield
        return
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        weight = kept[0] if kept else layer.weight
        if keep and not kept:
            weight = operand_of_head(weight, dtype)
            kept.append(weight)
        return head_logits(hidden, weight, layer.bias, compute_dtype=dtype)

    vars(layer)["forward"] = forward  # found before the method of the class
    try:
        yield
    finally:
        del vars(layer)["forward"]


def prepare(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device, switch dropout off and copy its configs; without weights it stays on meta."""
    copy_configs(model)
    return model.to(device).eval() if has_weights(model) else model.eval()
