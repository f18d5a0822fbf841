"""The command line: `ppo-fast` and `python -m ppo_fast.cli`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; without `argv` that of the process."""
    from ppo_fast.cli.commands import main as run  # it imports more than `import ppo_fast.cli` should

    return run(argv)
