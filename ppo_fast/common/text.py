"""Text for terminals, tables and messages."""

import difflib
from collections.abc import Iterable, Sequence


def escape_control(text: str) -> str:
    """Escape control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, longest: int = 160) -> str:
    """Shorten a text for a table cell: each run of whitespace becomes a space, and the middle is left out."""
    flat = escape_control(" ".join(text.split())) if text.strip() else repr(text)
    return flat if len(flat) <= longest else f"{flat[: longest // 2]} ... {flat[-longest // 2 :]}"


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> str:
    """Format a Markdown table; `align` is the separator of every column except the first."""
    separators = ["---", *[align] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, separators, *rows))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty; the name of its class if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that is most similar to the given one, or ""."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
