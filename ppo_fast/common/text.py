"""TODO docstring."""


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, longest: int = 160) -> str:
    """Text for a table cell: whitespace made visible as single spaces, the middle left out where it is long."""
    flat = printable(" ".join(text.split())) if text.strip() else repr(text)
    return flat if len(flat) <= longest else f"{flat[: longest // 2]} ... {flat[-longest // 2 :]}"
