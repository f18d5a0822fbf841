"""The origin of a critic: origin.json beside its value head names the model and the tokenizer that it belongs to.

A critic evaluates the answers of one model, and a shared value head reads its hidden states: with another model, or
another tokenizer, it gives numbers without a meaning. A critic without the file (a reward model, one of an older run)
is not checked.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.llm.hashes import vocabulary_hash
from ppo_fast.llm.models.head import LanguageModel
from ppo_fast.llm.models.weights import weights_hash

ORIGIN = "origin.json"


def origin_text(tokenizer: PreTrainedTokenizerBase, models: Sequence[str]) -> str:
    """The text of origin.json.

    Args:
        tokenizer: of the model.
        models: `weights_hash` of each model that the critic may be used with, as `load_actor` loads it; none: any.
    """
    return json.dumps({"tokenizer": vocabulary_hash(tokenizer), "models": list(models)}, indent=2) + "\n"


def check_origin(folder: Path, actor: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reject the critic in a folder if it belongs to another model or tokenizer.

    Args:
        folder: of the critic, whose origin.json may be missing.
        actor: as `load_actor` returned it.
        tokenizer: its tokenizer.

    Raises:
        UserError: the model or the vocabulary differs, or origin.json is damaged.
    """
    file = folder / ORIGIN
    if not file.is_file():
        return
    try:
        origin = json.loads(file.read_text(encoding="utf-8"))
        expected, models = str(origin["tokenizer"]), [str(model) for model in origin["models"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} was not written by ppo-fast ({first_line(error)}): remove it") from error
    if vocabulary_hash(tokenizer) != expected:
        raise UserError(
            f"the critic in {folder} belongs to another tokenizer, whose tokens have other numbers: give a critic that"
            " was trained with this model, or make one with ppo-fast critic"
        )
    if models and weights_hash(actor) not in models:
        raise UserError(
            f"the critic in {folder} belongs to another model: give the model that it was trained with, or make a"
            " critic of this model with ppo-fast critic"
        )
