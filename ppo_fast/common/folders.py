"""Output folders: a command writes only to a folder that is new, is its own, or has nothing that it could replace.

A folder of this project has a file `.ppo_fast` as its mark.
"""

from pathlib import Path

from ppo_fast.common.errors import UserError

MARK = ".ppo_fast"
# What commands write to the top of a folder, besides folders: files of others with these endings may have such a name.
# Anything else, such as a log to which the shell redirects the output, may be there before
ENDINGS = {".jsonl", ".json", ".yaml", ".md", ".png", ".gif", ".lock", ".holder"}


def claim(folder: str | Path, by: str = "") -> Path:
    """Make and mark an output folder. One that exists must have the mark, or nothing that could be replaced.

    Args:
        folder: made if it is missing, with those above it.
        by: the command, as its mark names it; the mark of another command is then rejected. "": any mark is accepted.

    Raises:
        UserError: the folder has files that this project did not write, or another command's results, or it cannot be
            written.
    """
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, and the results need a folder: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MARK).is_file():
            owner = (folder / MARK).read_text(encoding="utf-8", errors="replace").strip()
            if by and owner != by:
                raise UserError(f"{folder} holds the results of {owner}: choose another --out")
            return folder
        names = (x.name for x in folder.iterdir() if x.is_dir() or _ending(x) in ENDINGS)
        foreign = min((name for name in names if name != "lost+found"), default=None)  # at the top of a disk
        if foreign is not None:
            raise UserError(
                f"{folder} holds files that ppo_fast did not write, such as {foreign}: choose a new or empty folder"
                f" (--out); a copy of an output folder needs its hidden file {MARK}, too"
            )
        mark(folder, by)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def _ending(path: Path) -> str:
    return path.suffix or path.name  # of `.lock`, the name


def mark(folder: Path, by: str = "") -> None:
    """Write the mark of a folder of this project.

    Raises:
        OSError: it cannot be written.
    """
    (folder / MARK).write_text(f"{by or 'ppo_fast'}\n", encoding="utf-8")
