"""The trained model: a transformers folder with weights, tokenizer, generation config and a model card."""

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ppo_fast
from ppo_fast.common.checkpoint import UNFINISHED, replace, reported
from ppo_fast.common.errors import UserError
from ppo_fast.common.plots import can_draw, draw_learning_curves
from ppo_fast.common.text import markdown_table
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.hub import hub_name
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.critic_folder import write_critic
from ppo_fast.llm.models.frozen import is_stored, widen_frozen
from ppo_fast.llm.models.head import LanguageModel, text_config, unwrap_peft
from ppo_fast.llm.models.loading import source_dtype
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.models.weights import no_loading_bars, weights_hash

if TYPE_CHECKING:
    from peft import PeftModel

Model = TypeVar("Model", bound=nn.Module)

SHOWN = {
    "eval/score": "score on held-out prompts",
    "score": "score in training",
    "kl_per_answer": "KL to the start model per answer (nats)",
    "answer_tokens": "tokens per answer",
    "ended": "answers with an end token",
    "entropy": "entropy per token (nats)",
}


def save_model(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge_adapters: bool = False,
    weights: dict[str, Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
    history: Sequence[Mapping[str, float | None]] = (),
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load; an earlier folder is replaced.

    Args:
        actor: a transformers model, or a PeftModel: then the folder has its active adapter alone.
        merge_adapters: merge the adapters into the weights of a full model; the actor itself is not changed.
        weights: the actor's state dict, where the actor has only a shard of each (FSDP2).
        texts: files to add by name, such as README.md.
        history: metrics of each step, for a picture of the learning curves.
        dtype: of the weights in the folder; None: unchanged.

    Raises:
        UserError: it cannot be written; an earlier folder is unchanged.
    """
    with _new_folder(folder, "the model") as new:
        _save_weights(actor, new, merge_adapters=merge_adapters, weights=weights, dtype=dtype)
        tokenizer.save_pretrained(new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        if history and can_draw():
            draw_learning_curves(history, new / "learning_curves.png", "PPO")
    return folder


def save_critic(
    critic: Critic,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder that `load_critic` loads: the value head and, of a critic of its own, the backbone in fp32.

    Args:
        critic: the critic; adapters are merged into its backbone, the critic itself is not changed.
        tokenizer: of the actor.
        folder: an earlier one is replaced.
        weights: the critic's state dict, where it has only a shard of each (FSDP2).
        texts: files to add by name, such as origin.json.

    Raises:
        UserError: it cannot be written; an earlier folder is unchanged.
    """
    with _new_folder(folder, "the critic") as new, no_loading_bars():
        backbone = critic.backbone
        if backbone is not None:
            backbone = merged(cast(LanguageModel, backbone)) if is_adapted(backbone) else backbone
            tokenizer.save_pretrained(new)
        write_critic(critic, backbone, new, weights)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
    return folder


@contextmanager
def _new_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield an empty folder, which replaces the given one at the end of this block, unless an error occurs in it."""
    new = folder.with_name(folder.name + UNFINISHED)
    try:
        with reported(f"{what} could not be written to {folder}", folder):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
            replace(new, folder)
    except UserError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _save_weights(
    actor: LanguageModel,
    folder: Path,
    *,
    merge_adapters: bool,
    weights: dict[str, Tensor] | None,
    dtype: torch.dtype | None,
) -> None:
    with no_loading_bars():
        if is_adapted(actor) and not merge_adapters:
            state = weights if dtype is None else cast_weights(actor, weights, dtype)
            actor.save_pretrained(str(folder), selected_adapters=[actor.active_adapter], state_dict=state)
            return
        model = merged(actor)
        if dtype is None and is_stored(model):
            dtype = torch.float32
        state = weights if dtype is None else cast_weights(model, weights, dtype)
        model.save_pretrained(folder, state_dict=state)
        if dtype is not None:
            _note_dtype(folder / "config.json", dtype)


def cast_weights(model: nn.Module, weights: dict[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict with its parameters in another dtype, on the CPU. Tied weights remain one tensor."""
    state = model.state_dict() if weights is None else weights
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for name, x in state.items():
        if name in parameters and x.is_floating_point():
            found.setdefault((x.data_ptr(), tuple(x.shape)), x.detach().to(dtype).cpu())
    return {
        name: found[x.data_ptr(), tuple(x.shape)] if name in parameters and x.is_floating_point() else x
        for name, x in state.items()
    }


def _note_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the dtype into config.json, also for parts of the model; transformers writes the model's own."""
    name = str(dtype).removeprefix("torch.")

    def noted(values: dict[str, object]) -> dict[str, object]:
        nested = {key: noted(value) if isinstance(value, dict) else value for key, value in values.items()}
        return {**nested, "dtype": name} if isinstance(nested.get("dtype"), str) else nested

    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(noted(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def saved_dtype(actor: nn.Module, config: PPOConfig) -> torch.dtype | None:
    """Return the dtype of weights in OUT/model and OUT/best, by config.save_dtype; None: unchanged.

    Adapters that are saved alone are unchanged under "auto".
    """
    if config.save_dtype != "auto":
        return getattr(torch, config.save_dtype)
    return None if _saves_adapters(actor, config) else source_dtype(actor)


def saved_hash(actor: LanguageModel, config: PPOConfig) -> str | None:
    """`weights_hash` of the actor that `load_actor` loads from OUT/model; None: not known, because of adapters."""
    return None if is_adapted(actor) else weights_hash(actor, rounded=saved_dtype(actor, config))


def _saves_adapters(actor: nn.Module, config: PPOConfig) -> bool:
    return is_adapted(actor) and not config.merge_adapters


def check_saving(actor: LanguageModel, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> list[str]:
    """Try, before the first step, everything that saving needs except the weights; return sentences for the user.

    Raises:
        UserError: the model or its tokenizer could not be saved after the training.
    """
    if config.merge_adapters and is_adapted(actor) and not hasattr(actor, "merge_and_unload"):
        raise UserError("merge_adapters = true, but adapters of this kind cannot be merged: leave it out")
    with tempfile.TemporaryDirectory() as folder:
        _try_saving("the tokenizer", "correct it", lambda: tokenizer.save_pretrained(folder))
        if is_adapted(actor) and not config.merge_adapters:
            adapters = actor.peft_config[actor.active_adapter]
            _try_saving("the configuration of the adapters", "correct it", lambda: adapters.save_pretrained(folder))
        else:
            model = unwrap_peft(actor)
            advice = "correct it (config.json, or actor.config in Python)"
            _try_saving("the configuration of the model", advice, lambda: model.config.save_pretrained(folder))
            if model.can_generate():
                advice = "correct it (generation_config.json, or actor.generation_config in Python)"
                generation = model.generation_config
                _try_saving("the generation config", advice, lambda: generation.save_pretrained(folder))
    notes = _dtype_notes(actor, config)
    if config.parallel == "fsdp" and config.lora_rank and config.critic == "own":
        notes.append("OUT/critic is not written: under fsdp no process has the whole weights to merge its adapters")
    if config.merge_adapters and not is_adapted(actor):
        notes.append("merge_adapters has no effect: the actor has no adapters")
    return notes


def _try_saving(what: str, advice: str, save: Callable[[], object]) -> None:
    try:
        with reported(f"{what} could not be written to the temporary folder"):
            save()
    except UserError:
        raise
    except Exception as error:  # of any class: a tokenizer and a configuration may have their own code
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # transformers lists what is wrong in a generation config, one or more sentences each
        reason = next((line.removeprefix("- ").split(". ")[0] for line in lines if line.startswith("- ")), lines[0])
        raise UserError(f"{what} could not be saved after the training ({reason}): {advice}") from error


def _dtype_notes(actor: nn.Module, config: PPOConfig) -> list[str]:
    """Describe the dtype of the saved model, if it differs from that of the trained weights or of the start model."""
    saved, source = saved_dtype(actor, config), source_dtype(actor)
    if saved is None or (saved == torch.float32 and source in (None, saved)):
        return []
    name, start = (str(dtype).removeprefix("torch.") for dtype in (saved, source))
    if source not in (None, saved):
        return [f"the model is saved in {name}; the start model is in {start}"]
    return [f"the trained fp32 weights are rounded to {name} when the model is saved; save_dtype = float32 keeps them"]


def merged(actor: LanguageModel) -> PreTrainedModel:
    """Return a copy of the actor on the CPU with its adapters in its weights; without adapters, the actor itself.

    The copy is made on the CPU, because a GPU in training has no memory for a second model.
    """
    if not is_adapted(actor):
        return actor
    whole = copy_on_cpu(actor)
    widen_frozen(whole)  # peft adds the adapters in the dtype of the weights
    _untie_adapted(whole)
    return whole.merge_and_unload()


def _untie_adapted(actor: "PeftModel") -> None:
    """Copy the weights of the LM head if it shares them with the embedding and one of the two has an adapter.

    Merged into shared weights, the adapter would change both.
    """
    model = unwrap_peft(actor)
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (getattr(part, "base_layer", part) for part in parts)
    adapted = any(hasattr(part, "base_layer") for part in parts)
    if head is None or not adapted or getattr(head, "weight", None) is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, text_config(model)):
        config.tie_word_embeddings = False


def copy_on_cpu(model: Model) -> Model:
    """Copy the model to the CPU without memory on its own device. Tied weights remain tied."""
    there = [*model.parameters(), *model.buffers()]
    copies = {
        id(x): nn.Parameter(x.detach().to("cpu", copy=True), x.requires_grad)
        if isinstance(x, nn.Parameter)
        else x.to("cpu", copy=True)
        for x in there
    }
    return copy.deepcopy(model, copies)


def model_card(config: PPOConfig, run: Mapping[str, object], history: Sequence[Mapping[str, float | None]]) -> str:
    """Write Markdown for readers of the folder: results and options.

    Args:
        config: the options of the run.
        run: `PPOTrainer.run_options`: model, prompts, rewards; of paths only the last part is written.
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
    base = hub_name(str(run.get("model")))
    start = "" if base is None else f"base_model: {base}\n"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{start}tags:\n- ppo\n- rlhf\n- ppo_fast\n---",
        "# A language model trained with PPO",
        f"Trained for {history[-1]['step'] if history else 0} steps of {answers}"
        " answers with proximal policy optimisation (Schulman et al. 2017), by ppo_fast.",
        *(["## Results", _results(history), *picture] if history else []),
        "## Options",
        markdown_table(("", ""), [*named.items(), *((k, str(v)) for k, v in changed.items())]),
        "Every other option has its default. Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "What the model is good for, and its licence, follow from the start model, the prompts and the rewards.",
    ]
    return "\n\n".join(parts) + "\n"


def _results(history: Sequence[Mapping[str, float | None]]) -> str:
    rows = []
    for name, label in SHOWN.items():
        values = [x for m in history if (x := m.get(name)) is not None]
        if values:
            rows.append((label, f"{values[0]:z.4g}", f"{values[-1]:z.4g}"))
    return markdown_table(("", "first", "last"), rows)


def _names(value: object) -> str:
    """Return the last part of a path, or of each: the location of a folder is private, a name on the hub is not."""
    if isinstance(value, list):
        return ", ".join(map(_names, value))
    if isinstance(value, str) and hub_name(value) is not None:
        return value
    return Path(value).name if isinstance(value, str) else str(value)
