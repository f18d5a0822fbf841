"""The finished model: an ordinary transformers folder with weights, tokenizer, generation config and a model card."""

import copy
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import ppo_fast
from ppo_fast.checkpoint import UNFINISHED, replace
from ppo_fast.config import PPOConfig
from ppo_fast.errors import UserError
from ppo_fast.models import is_adapted, no_loading_bars
from ppo_fast.plots import can_draw, draw_learning_curves

SHOWN = {
    "eval/score": "score on held-out prompts",
    "score": "score in training",
    "kl_per_answer": "KL to the start model per answer (nats)",
    "answer_tokens": "tokens per answer",
    "ended": "answers with an end token",
    "entropy": "entropy per token (nats)",
}


def save_model(
    actor: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge_adapters: bool = False,
    weights: dict[str, Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes what `AutoModelForCausalLM.from_pretrained(folder)` and AutoTokenizer load; a folder there is replaced.

    Args:
        actor: a transformers model, or a PeftModel: then the folder holds its active adapter alone.
        merge_adapters: adapters become part of a full model's weights; the actor itself stays as it is.
        weights: the actor's state dict, where it holds only a part of each (FSDP2).
        texts: files to add by name, such as README.md.
        history: metrics of each step, for a picture of the curves beside them.

    Raises:
        UserError: it cannot be written; a folder that was there is as it was.
    """
    new = folder.with_name(folder.name + UNFINISHED)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with no_loading_bars():
            if is_adapted(actor) and not merge_adapters:
                actor.save_pretrained(new, selected_adapters=[actor.active_adapter], state_dict=weights)
            else:
                merged(actor).save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        if history and can_draw():
            draw_learning_curves(history, new / "learning_curves.png", "PPO")
        replace(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"the model could not be written to {folder}: {error.strerror or error}") from error
    return folder


def merged(actor: Any) -> Any:
    """A copy of the actor on the CPU with its adapters in its weights; an actor without adapters is returned as it is.

    The copy is made on the CPU, because a GPU that is full of the training has no room for a second model.
    """
    return copy_on_cpu(actor).merge_and_unload() if is_adapted(actor) else actor


def copy_on_cpu(model: nn.Module) -> Any:
    """A copy of the model on the CPU, which needs no memory on the model's own device. Tied weights stay tied."""
    there = [*model.parameters(), *model.buffers()]
    copies = {
        id(x): nn.Parameter(x.detach().to("cpu", copy=True), x.requires_grad)
        if isinstance(x, nn.Parameter)
        else x.to("cpu", copy=True)
        for x in there
    }
    return copy.deepcopy(model, copies)


def model_card(config: PPOConfig, run: dict[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for people who find the folder: what it is, what came out, how it was made.

    Args:
        config: the run's options.
        run: `PPOTrainer.run_options`: model, prompts, rewards; paths are cut to their last part.
        history: the metrics of each step.
    """
    named = {name: _names(value) for name, value in run.items() if value not in (None, [], False)}
    changed = {
        option.name: getattr(config, option.name)
        for option in dataclasses.fields(config)
        if getattr(config, option.name) != option.default and option.name != "out"
    }
    versions = {"ppo_fast": ppo_fast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    picture = ["![learning curves](learning_curves.png)"] if can_draw() else []
    answers = config.prompts_per_step * config.samples_per_prompt
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ppo\n- rlhf\n- ppo_fast\n---",
        "# A language model trained with PPO",
        f"Trained for {history[-1]['step'] if history else 0} steps of {answers}"
        " answers with proximal policy optimisation (Schulman et al. 2017), by ppo_fast.",
        *(["## What came out", _results(history), *picture] if history else []),
        "## How it was made",
        _table(("", ""), [*named.items(), *((k, str(v)) for k, v in changed.items())]),
        "Every other option has its default. Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "What the model is good for, and its licence, follow from the start model, the prompts and the rewards.",
    ]
    return "\n\n".join(parts) + "\n"


def _results(history: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, label in SHOWN.items():
        values = [m[name] for m in history if m.get(name) is not None]
        if values:
            rows.append((label, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return _table(("", "first", "last"), rows)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ("---",) * len(heading), *rows))


def _names(value: Any) -> str:
    """The last part of a path, or of each: where a folder lay is nobody's business."""
    if isinstance(value, list):
        return ", ".join(map(_names, value))
    return Path(value).name if isinstance(value, str) else str(value)
