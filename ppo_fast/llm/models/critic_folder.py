"""A critic in a folder: OUT/critic of a run, or a reward model, from which a critic starts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.models.critic import Critic, hidden_size_of
from ppo_fast.llm.models.reward_model import load_reward_model
from ppo_fast.llm.models.weights import check_folder, load_structure, load_weights

VALUE_HEAD = "value_head.safetensors"
# tensors of this file, and their names in a critic's state dict
HEAD = {"weight": "head.weight", "bias": "head.bias", "mean": "value_mean", "std": "value_std"}


def write_critic(
    critic: Critic, backbone: nn.Module | None, folder: Path, weights: Mapping[str, Tensor] | None
) -> None:
    """Write the value head with its scale and, of a critic with a backbone of its own, the backbone, to a folder.

    Args:
        critic: the critic.
        backbone: without adapters; None: the critic reads the actor's hidden states.
        folder: an empty folder.
        weights: the critic's state dict, where it has only a shard of each (FSDP2).
    """
    state = critic.state_dict() if weights is None else weights
    saved = {name: state[key].detach().float().cpu().contiguous() for name, key in HEAD.items()}
    save_file(saved, folder / VALUE_HEAD)
    if isinstance(backbone, PreTrainedModel):
        prefix = "backbone."
        whole = (
            None if weights is None else {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}
        )
        backbone.save_pretrained(folder, state_dict=whole)


def load_critic(folder: Path, *, weights: bool = True) -> tuple[Critic, None]:
    """Load a critic in fp32 from OUT/critic of a run or from a reward model.

    Without `weights` its backbone is on the meta device, as in `load_actor`. A critic without a backbone is a value
    head, which a run with critic = shared continues.

    Raises:
        UserError: there is no critic in the folder, or it cannot be loaded.
    """
    if not (folder / VALUE_HEAD).is_file():
        model, _ = load_reward_model(folder, weights=weights, dtype=torch.float32)
        return Critic.from_reward_model(model), None
    head = _read_head(folder / VALUE_HEAD)
    backbone = None
    if (folder / "config.json").is_file():
        check_folder(folder, "critic")
        advice = "give OUT/critic of a run"
        if weights:
            backbone = load_weights(AutoModel, folder, "critic", advice, dtype=torch.float32)
        else:
            backbone = load_structure(AutoModel, folder, "critic", dtype=torch.float32)
    width = head["weight"].shape[1]
    if backbone is not None and weights and width != hidden_size_of(backbone):
        raise UserError(f"{folder / VALUE_HEAD} reads {width} numbers, but the critic in {folder} gives another number")
    critic = Critic(backbone, width)
    critic.load_state_dict({HEAD[name]: x for name, x in head.items()}, strict=False)  # the backbone is loaded already
    if backbone is not None and not weights:
        critic.head.to("meta")
    return critic.eval().requires_grad_(True), None


def _read_head(file: Path) -> dict[str, Tensor]:
    """The tensors of HEAD; without a scale, as in older files, the head predicts in units of the reward."""
    try:
        with safe_open(file, framework="pt") as opened:
            scaled = not {"mean", "std"}.isdisjoint(opened.keys())
            head = {name: opened.get_tensor(name) for name in (HEAD if scaled else ("weight", "bias"))}
    except Exception as error:  # safetensors raises errors of its own class for a damaged file
        raise UserError(f"cannot read the value head in {file}: {first_line(error)}") from error
    if head["weight"].ndim != 2 or head["weight"].shape[0] != 1 or head["bias"].shape != (1,):
        raise UserError(f"cannot read the value head in {file}: its weight is {list(head['weight'].shape)}, not [1, D]")
    if not all(x.isfinite().all() for x in head.values()):
        raise UserError(f"the value head in {file} has NaN or infinite values")
    scale = [head.setdefault(name, torch.tensor(x)) for name, x in (("mean", 0.0), ("std", 1.0))]
    if any(x.numel() != 1 for x in scale) or not head["std"].item() > 0:
        raise UserError(
            f"the value head in {file} has the scale mean = {head['mean'].tolist()}, std = {head['std'].tolist()}: it"
            " needs one number each, and std > 0"
        )
    return {name: x.reshape(()) if name in ("mean", "std") else x for name, x in head.items()}
