"""Models and data sets by name: a folder or file on this machine, or a name on the Hugging Face hub.

What exists on this machine takes precedence over a name on the hub. Downloads go through huggingface_hub and datasets,
with their caches and environment variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN). The commit to which a name
resolves becomes part of the name, so that a run says what it has read, and its configuration reads the same again.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset

# of a model: OWNER/NAME or NAME, perhaps with @REVISION; of a data set also with :CONFIGURATION and :SPLIT
_PART = r"[A-Za-z0-9][\w.-]*"
_MODEL = re.compile(rf"(?P<repo>(?:{_PART}/)?{_PART})(?:@(?P<revision>[\w./-]+))?")
_DATA = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?"
)
_FILES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".txt", ".gguf", ".safetensors", ".bin")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_name(name: str) -> str | None:
    """Return OWNER/NAME of a model that was read from the hub, OWNER/NAME@COMMIT; None for files of this machine.

    >>> hub_name("me/tiny@4f5dcc825b274a0af46745456f0d5d426ee46a95"), hub_name("runs/model")
    ('me/tiny', None)
    """
    repo, _, commit = name.rpartition("@")
    return repo if re.fullmatch("[0-9a-f]{40}", commit.partition(":")[0]) else None


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read.

    Args:
        name: a folder, a .gguf file, or OWNER/NAME@COMMIT of the hub.
        path: of the folder or .gguf file on this machine.
    """

    name: str
    path: Path


def find_model(name: str | Path, what: str = "model", *, code: bool = False, weights: bool = True) -> ModelSource:
    """Find a model on this machine, or download it from the hub.

    Args:
        name: a folder, a .gguf file, or the name of a repository, perhaps with @REVISION (a branch, tag or commit).
        what: its role in messages.
        code: also download Python files, which `trust_remote_code` runs.
        weights: download them; else the configuration only.

    Raises:
        UserError: there is no such file, folder or repository, it cannot be read, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if str(name).endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"no {what} in {name}: there is no such file")
        return ModelSource(str(name), path)
    match = _MODEL.fullmatch(str(name))
    if path.exists() or match is None:
        return ModelSource(str(name), path)  # `check_folder` names what is missing
    repo, revision = match["repo"], match["revision"]
    wanted = (
        ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *["*.py"] * code] if weights else ["config.json"]
    )
    folder = _download(repo, revision, str(name), what, wanted)
    return ModelSource(f"{repo}@{folder.name}", folder)


def _download(repo: str, revision: str | None, name: str, what: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _reported(f"the {what} {repo}", name, revision, "folder"):
        # without subfolders, in which repositories keep the same weights in formats of other programs
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


@contextmanager
def _reported(what: str, name: str, revision: str | None, here: str) -> Iterator[None]:
    """Turn an error of a download into a sentence; `here` is what this machine might have instead of it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    absent = f"there is no {here} {name}{_similar(name)}"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its conditions on its page on the hub, and {_LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {revision}: name a branch, a tag or a commit") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        offline = _offline()
        reason = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"{absent}, and {what} is not in the cache of the hub, while {reason}: correct the name, or"
            f" {'unset it' if offline else 'connect this machine'} once to download it"
        ) from error
    except Exception as error:  # those of the HTTP client differ between versions of huggingface_hub
        if isinstance(error, RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
            raise UserError(
                f"{absent}, and the hub has none of this name, or it is private: correct the name, or {_LOG_IN}"
            ) from error
        raise UserError(f"cannot read {what}: {first_line(error)}; the same command resumes a download") from error


def _similar(name: str) -> str:
    """Name the folder that was probably meant."""
    path = Path(name)
    try:
        found = nearest(path.name, [x.name for x in path.parent.iterdir() if x.is_dir()])
    except OSError:
        return ""
    return f" ({found.removeprefix('; ')})" if found else ""


def is_dataset_name(name: str | Path) -> bool:
    """Check whether this is the name of a data set, and not of a file or folder: nothing of this name exists."""
    match = _DATA.fullmatch(str(name))
    return match is not None and not Path(name).exists() and not str(match["repo"]).endswith(_FILES)


def load_dataset(name: str) -> tuple["Dataset", str]:
    """Load a split of a data set of the hub.

    Args:
        name: OWNER/NAME[@REVISION][:CONFIGURATION][:SPLIT]; a single part after the name is a split, if the data set
            has no such configuration.

    Returns:
        The split, and its whole name: with the commit that it is from, configuration and split.

    Raises:
        UserError: it is not there or cannot be read, or it has several configurations or splits and none is named.
    """
    match = _DATA.fullmatch(name)
    if match is None:
        raise UserError(f"{name} is no name of a data set: give OWNER/NAME:SPLIT or OWNER/NAME:CONFIGURATION:SPLIT")
    repo, revision = match["repo"], match["revision"]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs datasets: pip install datasets, or the extra ppo_fast[data]") from error
    with _reported(f"the data set {repo}", name, revision, "file"):
        config, split = match["first"], match["second"]
        if config is None or split is None or not _offline():  # offline, all configurations have the name "default"
            configs = datasets.get_dataset_config_names(repo, revision=revision)
            config, split = _config_and_split(repo, configs, config, split)
        builder = datasets.load_dataset_builder(repo, config, revision=revision)
        builder.download_and_prepare()
        split = _known(f"the data set {repo}", "split", split, list(builder.info.splits or {}), f"{repo}:{config}:")
        commit = builder.hash or revision
        return builder.as_dataset(split=split), f"{repo}{f'@{commit}' if commit else ''}:{config}:{split}"


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _config_and_split(repo: str, configs: list[str], first: str | None, second: str | None) -> tuple[str, str | None]:
    """Which of the two parts of a name is the configuration, and which is the split."""
    if second is None and first is not None and first not in configs and len(configs) == 1:
        return configs[0], first
    return _known(f"the data set {repo}", "configuration", first, configs, f"{repo}:"), second


def _known(what: str, kind: str, name: str | None, known: list[str], before: str) -> str:
    """Return a configuration or split: the given one, or the only one."""
    if name is None and len(known) == 1:
        return known[0]
    if name is not None and name in known:
        return name
    problem = f"several {kind}s" if name is None else f"no {kind} {name!r}{nearest(name, known)}"
    raise UserError(f"{what} has {problem}: name one of {', '.join(known)}, for instance {before}{known[0]}")
