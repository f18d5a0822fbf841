"""Loading weights from a folder or a .gguf file: all weights in it, and no others."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias, TypedDict, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ppo_fast.common.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors

AutoModelClass: TypeAlias = type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]

# Masks and tables that older versions of transformers saved with the weights, as in GPT-2 and Pythia; models make them
CONSTANTS = re.compile(r"(^|\.)((attn|self_attn|attention)\.bias|masked_bias|inv_freq|position_ids)$")


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Disable the progress bars of transformers: a run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Disable the table of transformers for weights that do not fit: here they are errors."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_loading_bars():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn an error of a damaged folder into a sentence.

    transformers, safetensors, tokenizers, and the code of a model raise errors of every class, tokenizers also a plain
    Exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise UserError(f"cannot load {what}: {reason}") from error


def is_gguf(path: str | Path) -> bool:
    """Check whether this is the name of a .gguf file, which holds a model and its tokenizer."""
    return Path(path).suffix == ".gguf"


def source_arguments(path: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the first argument of transformers' `from_pretrained` for a folder or .gguf file, and other arguments."""
    return (Path(path).parent, {"gguf_file": Path(path).name}) if is_gguf(path) else (Path(path), {})


def check_folder(folder: str | Path, what: str, *, trust_remote_code: bool = False) -> None:
    """Reject a folder without a safe model: adapters alone, pickles, which can run code, a damaged config.json.

    A .gguf file must exist and have an architecture that transformers reads.

    Raises:
        UserError: names what to give instead.
    """
    folder = Path(folder)
    if is_gguf(folder):
        _check_gguf(folder, what)
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds adapters: merge them into their model (merge_and_unload of peft, or --merge-adapters in"
            " the run that trains them) and give the folder of that, or give PPOTrainer a PeftModel from Python"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"no {what} in {folder}: it has no config.json; give a folder that save_pretrained wrote")
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when it is read: if you trust it, load it once with"
            " from_pretrained(..., use_safetensors=False), and give the folder that save_pretrained then writes"
        )
    if (folder / "generation_config.json").is_file():  # transformers ignores a damaged file, with its end tokens
        with _reading(f"generation_config.json in {folder}"):
            json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    with _reading(f"the {what} in {folder}"):
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _check_gguf(file: Path, what: str) -> None:
    if not file.is_file():
        raise UserError(f"no {what} in {file}: there is no such file")
    if find_spec("gguf") is None:
        raise UserError(f"reading {file} needs gguf: pip install gguf")
    folder, gguf = source_arguments(file)
    with _reading(f"the {what} in {file}"):
        AutoConfig.from_pretrained(folder, local_files_only=True, **gguf)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder.

    Raises:
        UserError: it cannot be loaded.
    """
    with _reading(f"the tokenizer in {folder}"):
        place, gguf = source_arguments(folder)
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=trust_remote_code, **gguf)


class _Report(TypedDict):
    """The differences between config.json and the files that transformers finds."""

    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape of the model
    missing_keys: set[str]
    unexpected_keys: set[str]


def load_weights(
    kind: AutoModelClass,
    folder: str | Path,
    what: str,
    advice: str,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model of an AutoModel class with the weights in a folder or file that `check_folder` has accepted.

    Args:
        kind: the AutoModel class.
        folder: with config.json and safetensors files; or a .gguf file, whose quantised weights become fp32.
        what: the model's role in messages, such as "model".
        advice: what to give instead of a folder that lacks weights.
        dtype: of the weights; None: that of the files.
        trust_remote_code: run the Python files in the folder.

    Raises:
        UserError: the folder has no weights in safetensors files, too few, too many, some of another size, or some that
            are NaN or infinite.
    """
    place, gguf = source_arguments(folder)
    with _reading(f"the {what} in {folder}"), _no_loading_report():
        loaded = kind.from_pretrained(
            place,
            dtype=dtype or (torch.float32 if gguf else "auto"),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
            **gguf,
        )
    model, report = cast(tuple[PreTrainedModel, _Report], loaded)  # as output_loading_info asks for
    if gguf:  # no longer quantised: `save_pretrained` writes an ordinary folder
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        del model.config.quantization_config
    _check_report(report, model, f"the {what} in {folder}", advice)
    check_finite(model, f"the {what} in {folder}")
    return model


def load_structure(
    kind: AutoModelClass,
    folder: str | Path,
    what: str,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the same model on the meta device, from its configuration; weights are not read."""
    how = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _reading(f"the {what} in {folder}"):
        place, gguf = source_arguments(folder)
        config = AutoConfig.from_pretrained(place, **how, **gguf)
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype or config.dtype, trust_remote_code=trust_remote_code)
        if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _check_report(report: _Report, model: nn.Module, where: str, advice: str) -> None:
    """Reject weights that differ from the description in config.json."""
    sizes = sorted(report["mismatched_keys"])
    if sizes:
        _, found, expected = sizes[0]
        raise UserError(
            f"{where} has weights of another size than its config.json describes, {_named([x[0] for x in sizes])}"
            f" ({list(found)} instead of {list(expected)}): the files belong to different models"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{where} lacks {_named(missing)}, which would start at random: {advice}")
    buffers = {name for name, _ in model.named_buffers()}
    constants = {name for name in report["unexpected_keys"] if name in buffers or CONSTANTS.search(name)}
    surplus = sorted(set(report["unexpected_keys"]) - constants)
    if surplus:
        raise UserError(
            f"{where} has weights that its config.json does not describe, {_named(surplus)}: the files belong to"
            " different models, or to another class of model, such as one with a value head (v_head); if these weights"
            " are not needed, load the model once with from_pretrained and give the folder that save_pretrained writes"
        )


def _named(names: list[str]) -> str:
    others = len(names) - 1
    return names[0] + (f" and {others} other{'s' * (others > 1)}" if others else "")


def check_finite(model: nn.Module, what: str) -> None:
    """Reject NaN and infinite weights, with one pass over them and one copy to the host for each device.

    Raises:
        UserError: names the first such weight.
    """
    weights = [
        (name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta and p.numel()
    ]
    bounds: dict[torch.device, list[Tensor]] = {}
    for _, p in weights:
        x = p.detach() if p.element_size() > 1 else p.detach().float()  # PyTorch has no aminmax for 8 bits
        bounds.setdefault(x.device, []).append(torch.stack(x.aminmax()).float())  # NaN becomes both bounds
    found = {device: iter(torch.stack(some).isfinite().all(1).tolist()) for device, some in bounds.items()}
    wrong = [name for name, p in weights if not next(found[p.device])]
    if wrong:
        raise UserError(f"{what} has NaN or infinite values in {_named(wrong)}: it was damaged, or its training failed")


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """Return the dtype of most weights in a folder's safetensors files; None if it is none of DTYPES, or for .gguf."""
    if is_gguf(folder):
        return None
    counts: dict[str, int] = {}
    for file in _weight_files(Path(folder)):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                part = opened.get_slice(name)
                counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + torch.Size(part.get_shape()).numel()
    return DTYPES.get(max(counts, key=lambda name: counts[name])) if counts else None


def _weight_files(folder: Path) -> Iterable[Path]:
    """List the files that transformers reads."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def check_trained_in_fp32(model: nn.Module, what: str) -> None:
    """Reject training of weights in another dtype: small updates round to nothing in half precision.

    Raises:
        UserError: names the first such weight.
    """
    wrong = [(name, p.dtype) for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        name, dtype = wrong[0]
        if dtype == torch.float64:
            raise UserError(f"{what} is in float64 ({name}), but the losses are computed in fp32: call .float() on it")
        raise UserError(
            f"{what} would be trained in {str(dtype).removeprefix('torch.')} ({name}), in which small updates round to"
            f" nothing: call .float() on it, or load it with dtype=torch.float32; --dtype bfloat16 computes in bfloat16"
            " with weights in fp32"
        )


def check_separate(trained: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> None:
    """Reject models that share memory with a model that is trained: they would change with it.

    Args:
        trained: by role, such as "the actor"; each is compared with each of the others, and with `others`.
        others: models that must not change, by role.

    Raises:
        UserError: names two roles and a weight.
    """
    owners: dict[tuple[torch.device, int], str] = {}
    for role, model in trained.items():
        for name, place, learns in _places(model):
            if learns and owners.setdefault(place, role) != role:
                raise UserError(_shared(role, owners[place], name))
    for role, model in [*others.items(), *trained.items()]:
        for name, place, _ in _places(model):
            if owners.get(place, role) != role:
                raise UserError(_shared(role, owners[place], name))


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[torch.device, int], bool]]:
    """List name, memory, and whether it is trained, of each weight that has memory."""
    for name, p in model.named_parameters():
        if not p.is_meta and p.numel():
            yield name, (p.device, p.untyped_storage().data_ptr()), p.requires_grad


def _shared(role: str, owner: str, name: str) -> str:
    return (
        f"{role} shares {name} with {owner}, which is trained, so that it would change, too: give a copy"
        " (copy.deepcopy(model)), or load it a second time"
    )


def weights_hash(model: nn.Module, *, rounded: torch.dtype | None = None) -> str:
    """Hash the values of all parameters; the hash is the same on every device, in any order of summation.

    Args:
        model: whose parameters are hashed.
        rounded: hash them as they are after they were saved in this dtype and loaded in their own; None: as they are.
    """
    found = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device  # of all sums: one copy to the host instead of one for each

    def sum_of_bits(p: Tensor) -> Tensor:
        x = p.detach()
        if rounded is not None and x.is_floating_point():
            x = x.to(rounded).to(x.dtype)  # of one parameter at a time: a GPU may have no memory for all
        return x.contiguous().view(integers[x.element_size()]).sum(dtype=torch.int64).to(device)

    sums = torch.stack([sum_of_bits(p) for p in parameters.values()]).tolist()
    for (name, p), total in zip(parameters.items(), sums, strict=True):
        found.update(f"{name} {tuple(p.shape)} {p.dtype} {total}\n".encode())
    return found.hexdigest()[:16]
