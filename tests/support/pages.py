"""The Markdown pages of the project: their sections, commands and links."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MARKS = (
    "needs a GPU",
    "needs two machines",
    "needs its own environment",
    "needs clang++",
)  # in the comment of a command that CI cannot run


class Command(NamedTuple):
    """A command of a page: one line of a bash block, continuation lines joined, without its comment."""

    page: str
    section: str
    text: str
    mark: str  # what of MARKS its comment says, or a comment in the first line of its block, or ""

    def parts(self) -> list[list[str]]:
        """The words of each command that `&&` joins, without assignments to environment variables."""
        found = [shlex.split(part) for part in self.text.split(" && ")]
        return [words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)) :] for words in found]


def pages() -> list[Path]:
    """All Markdown pages that people write; those in bench/results are made by commands."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = listed.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md")]
    return [ROOT / name for name in names if not name.startswith(("bench/results", "."))]


def sections(text: str) -> dict[str, str]:
    """The text of each section of a page by its title."""
    return {part.splitlines()[0].lstrip("# "): part for part in re.split(r"^## ", text, flags=re.MULTILINE)}


def blocks(text: str, language: str) -> list[str]:
    """The code of each block in a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[Command]:
    """Every command of a page, in order."""
    found = []
    for title, text in sections(page.read_text(encoding="utf-8")).items():
        for block in blocks(text, "bash"):
            whole = next((mark for mark in MARKS if mark in block.splitlines()[0] and block.startswith("#")), "")
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                code, _, comment = line.partition("  #")
                if code.strip() and not code.strip().startswith("#"):
                    mark = whole or next((mark for mark in MARKS if mark in comment), "")
                    found.append(Command(str(page.relative_to(ROOT)), title, code.strip(), mark))
    return found


def all_commands() -> list[Command]:
    return [command for page in pages() for command in commands(page)]


def links(page: Path) -> list[str]:
    """Relative links of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\n\s*", " ", text))
    return [link for link in found if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What a link to a section of a page ends with, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
