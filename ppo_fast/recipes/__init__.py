"""Recipes: a configuration and a few prompts for each common task, to copy, try and change.

ppo-fast recipe                                  # which there are
ppo-fast recipe summarisation my_summaries       # copies one
ppo-fast train --config my_summaries/recipe.yaml --model DIR --out runs/first
"""

import json
from importlib.resources import files
from pathlib import Path

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import nearest

NAMES = ("question_answering", "summarisation", "translation", "dialogue", "free_text", "classification")
_FILES = ("recipe.yaml", "prompts.jsonl", "held_out.jsonl")


def describe(name: str) -> str:
    """What a recipe is for: the first line of its file."""
    return _read(name, "recipe.yaml").splitlines()[0].lstrip("# ")


def copy(name: str, folder: str | Path) -> list[Path]:
    """Write a recipe's files to a folder, with that folder's name in recipe.yaml; what it wrote.

    Raises:
        UserError: there is no such recipe, or the folder holds one of the files already, or cannot be written.
    """
    if name not in NAMES:
        raise UserError(f"there is no recipe {name!r}{nearest(name, NAMES)} (there are {', '.join(NAMES)})")
    folder = Path(folder)
    written = [folder / file for file in _FILES]
    for path in written:
        if path.exists():
            raise UserError(f"{path} is there already: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in written:
            text = _read(name, path.name).replace("FOLDER", json.dumps(folder.as_posix())[1:-1])
            with path.open(
                "x", encoding="utf-8"
            ) as file:  # x: nothing that is there is overwritten, also not by a link
                file.write(text)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return written


def _read(name: str, file: str) -> str:
    return (files(__name__) / name / file).read_text(encoding="utf-8")
