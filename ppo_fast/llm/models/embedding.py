"""The gradient of an input embedding that is also the LM head.

The head's gradient is as large as the weight, and has a value everywhere. autograd makes another tensor of this
size for the tokens that the embedding looked up, almost all of it 0, and a third one for the sum. Here the gradients
of these tokens are added to the head's gradient, in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ppo_fast.llm.models.head import LanguageModel, head_of, unwrap_peft


class _Context(Protocol):
    ids: Tensor
    layer: nn.Embedding


class _Lookup(torch.autograd.Function):
    """weight[ids], whose backward adds to `weight.grad`. autograd must not know of the weight: it would wait with the
    head's gradient for that of the lookup. `graph` is any tensor that requires a gradient; it gets none."""

    @staticmethod
    def forward(ctx: _Context, graph: Tensor, ids: Tensor, layer: nn.Embedding) -> Tensor:
        ctx.ids, ctx.layer = ids, layer
        return nn.functional.embedding(ids, layer.weight)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, None, None]:
        weight, ids, rows = ctx.layer.weight, ctx.ids.flatten(), grad.flatten(0, -2)
        if weight.grad is None:  # the loss does not depend on the head, as that of the critic alone
            weight.grad = torch.zeros_like(weight)
        if ctx.layer.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.layer.padding_idx).unsqueeze(1), 0)
        _add_rows(weight.grad, ids, rows.to(weight.dtype))
        return None, None, None


def _add_rows(x: Tensor, ids: Tensor, rows: Tensor) -> None:
    """x[ids] += rows, in an order that does not change: on a CPU index_put_ adds with several threads in the order of
    their times, and on a GPU so does index_add_."""
    if x.device.type == "cpu":
        x.index_add_(0, ids, rows)
    else:
        x.index_put_((ids,), rows, accumulate=True)


def _is_plain(layer: nn.Module | None, head: nn.Module | None) -> bool:
    """Whether a trained embedding is a lookup and nothing else, of the weight of an LM head."""
    if type(layer) is not nn.Embedding or type(head) is not nn.Linear or layer.weight is not head.weight:
        return False
    hooks = layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks
    return layer.weight.requires_grad and layer.max_norm is None and not layer.scale_grad_by_freq and not hooks


@contextmanager
def tied_gradient(model: LanguageModel, *, enabled: bool) -> Iterator[None]:
    """Backward passes inside this block add to the gradient of a tied embedding in place.

    Args:
        model: nothing changes for one whose embedding and head have weights of their own, or do more than that.
        enabled: False where gradients have hooks, which several processes need.
    """
    layer = unwrap_peft(model).get_input_embeddings() if enabled else None
    if not (isinstance(layer, nn.Embedding) and _is_plain(layer, head_of(model))):
        yield
        return
    graph = torch.zeros((), requires_grad=True)

    def forward(ids: Tensor) -> Tensor:
        out: Tensor = _Lookup.apply(graph, ids, layer)
        return out

    vars(layer)["forward"] = forward  # found before the method of the class
    try:
        yield
    finally:
        del vars(layer)["forward"]
