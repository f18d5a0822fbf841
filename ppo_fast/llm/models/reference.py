"""The reference policy: a frozen copy of the actor, or the actor itself without its trained adapters."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ppo_fast.common.device import has_weights
from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.models.adapters import ADVICE, CLONING_ERRORS, has_trained_adapters
from ppo_fast.llm.models.head import HeadInfo, input_embedding, logprobs_of
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.packing.pack import Pack

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import TypeIs

Model = TypeVar("Model", bound=nn.Module)


def frozen_copy(model: Model) -> Model:
    """A copy that is never trained: the reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def is_adapted(model: object) -> "TypeIs[PeftModel]":
    """Whether peft has put adapters into it."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


class AdapterReference:
    """The reference of an actor with adapters: the actor without them, or with a frozen copy of those it came with.

    Switching adapters off is wrong for an actor that starts from trained ones (TRL #495, #4723). `starts_trained` is
    True for such an actor; `has_trained_adapters` finds it if it is not given.

    Raises:
        UserError: peft cannot keep a second adapter of this kind, or training changes weights that are not the
            adapter's own, which would change the reference, too.
    """

    NAME = "ppo_fast_reference"

    def __init__(self, actor: "PeftModel", *, starts_trained: bool | None = None) -> None:
        self.actor = actor
        self.active = actor.active_adapter
        self._check_trained()
        self.starts_trained = has_trained_adapters(actor) if starts_trained is None else starts_trained
        if self.starts_trained:
            self._clone()

    def _check_trained(self) -> None:
        """Reject trained weights that the reference would share, such as the biases of LoRA's bias="all"."""
        shared = [n for n, p in self.actor.named_parameters() if p.requires_grad and self.active not in n.split(".")]
        if shared:
            raise UserError(
                f"training changes {shared[0]}, which is not the adapter's own, so that the reference would change with"
                f" the actor: freeze it (bias = 'none' in LoRA's configuration), or {ADVICE}"
            )

    def _clone(self) -> None:
        trainable = self._trainable()
        config = copy.deepcopy(self.actor.peft_config[self.active])
        try:
            self.actor.add_adapter(self.NAME, config)
        except CLONING_ERRORS as error:
            raise UserError(
                f"peft cannot keep a frozen copy of the actor's adapter ({first_line(error)}): {ADVICE}"
            ) from error
        self._copy_weights()
        for name, module in self.actor.named_modules():
            if self.NAME in name.split("."):
                module.eval()  # peft makes them in training mode: dropout would be active in the reference
        self._train_only(trainable)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        parameters: dict[str, Tensor] = dict(self.actor.named_parameters())
        tensors = {**parameters, **dict(self.actor.named_buffers())}
        for name, source in tensors.items():
            if self.active not in name.split("."):
                continue
            clone = tensors.get(_renamed(name, self.active, self.NAME))
            if name in parameters and (clone is None or clone.shape != source.shape):
                raise UserError(f"peft keeps no frozen copy of {name}: {ADVICE}")
            # peft may have given the clone memory, even on the meta device
            if clone is not None and clone.shape == source.shape and not source.is_meta:
                clone.copy_(source)

    @torch.no_grad()
    def check(self) -> None:
        """Compare the reference with the actor from whose adapter it was copied, before any training.

        Raises:
            UserError: their logits differ.
        """
        if not self.starts_trained or not has_weights(self.actor):
            return
        weight = input_embedding(self.actor)
        ids = (torch.arange(16, device=weight.device) * 7919 % weight.shape[0]).unsqueeze(0)
        expected = self.actor(input_ids=ids).logits
        with self():
            found = self.actor(input_ids=ids).logits
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise UserError(f"the frozen copy of the actor's adapter gives other logits than the adapter: {ADVICE}")

    def _trainable(self) -> set[str]:
        return {name for name, p in self.actor.named_parameters() if p.requires_grad}

    def _train_only(self, names: set[str]) -> None:
        for name, p in self.actor.named_parameters():
            p.requires_grad_(name in names)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The actor is the reference inside this block."""
        trainable = self._trainable()
        if not self.starts_trained:
            with self.actor.disable_adapter():
                yield
        else:
            self.actor.set_adapter(self.NAME)
            try:
                yield
            finally:
                self.actor.set_adapter(self.active)
        self._train_only(trainable)


def _renamed(name: str, old: str, new: str) -> str:
    return ".".join(new if part == old else part for part in name.split("."))


class FrozenReference(nn.Module):
    """A model that is never trained, from which the KL penalty is computed."""

    def __init__(self, model: nn.Module, head: HeadInfo, config: PPOConfig) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.config = config
        self.rounded = False  # whether `store_frozen` has changed values

    def forward(self, pack: Pack) -> Tensor:
        """Log-probabilities [n] of the pack's counted tokens."""
        with autocast(self.config.dtype, pack.input_ids.device):
            return logprobs_of(self.model, self.head, pack, self.config)[0]


Reference = FrozenReference | AdapterReference | None
