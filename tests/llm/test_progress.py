"""What a run shows: numbers that fit the terminal, no minus before a zero, and how far each phase is."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ppo_fast.common.console import counted, say
from ppo_fast.llm.report.progress import COLUMNS, heading, line

METRICS = (
    {column.metric: 0.5 for column in COLUMNS}
    | {"step": 7, "kl": -1e-5, "mfu": 0.125}
    | {f"seconds/{part}": 0.25 for part in ("sample", "reward", "advantages", "learn")}
)


def test_a_number_that_rounds_to_zero_has_no_sign():
    for kl in (-1e-5, 0.0, -0.0, 1e-5):
        assert "  0.0000" in line(METRICS | {"kl": kl}, 100)
    assert " -0.0001" in line(METRICS | {"kl": -1e-4}, 100)


@pytest.mark.parametrize("width", [None, 30, 40, 60, 80, 90, 119, 200])
@pytest.mark.parametrize("steps", [9, 100, 99999])
def test_a_line_fits_the_terminal_and_its_heading(width, steps):
    shown, names = line(METRICS, steps, width), heading(steps, width)
    assert len(shown) == len(names)
    assert width is None or len(shown) <= width
    assert ("learn" in names) == (width is None or width >= 120 or (width == 119 and steps < 99999))
    assert ("mfu" in names) == ("0.125" in shown) == (width in (None, 200) or (width == 119 and steps == 9))
    assert shown.split()[:2] == ["step", f"7/{steps}"]
    assert "1.00" in shown, "the seconds are always there"
    if width == 40:
        assert names.split()[0] == "score"


def shown(console: Console, seconds: list[float], monkeypatch, counts: list[int]) -> None:
    """A phase of 400 steps whose clock shows these seconds, at these counts."""
    times = iter([0.0, *seconds])
    monkeypatch.setattr("ppo_fast.common.console.time.perf_counter", lambda: next(times))
    with counted(console, "supervised", 400) as advance:
        for count in counts:
            advance(count, f"loss {count / 100:.1f}")


def test_without_a_terminal_a_phase_prints_lines_now_and_then(monkeypatch):
    file = StringIO()
    console = Console(file=file, width=40)
    shown(console, [1.0, 2.5, 9.0, 12.5, 16.0], monkeypatch, [10, 40, 200, 300, 400])
    assert file.getvalue().splitlines() == [
        "supervised, loss 0.4: 40/400, 22 s left",
        "supervised, loss 3.0: 300/400, 4 s left",
        "supervised, loss 4.0: 400/400",
    ]


def test_a_terminal_of_40_columns_shows_a_bar_that_does_not_wrap():
    file = StringIO()
    console = Console(file=file, width=40, force_terminal=True, color_system=None)
    with counted(console, "supervised", 400) as advance:
        advance(100, "loss 0.123")
    lines = [x for x in file.getvalue().replace("\r", "\n").splitlines() if "100/400" in x]
    assert lines
    assert all(len(x) <= 40 + len("\x1b[2K\x1b[?25h") for x in lines)
    assert "-:--:--" in lines[-1] or "0:0" in lines[-1]


def test_quiet_phases_print_nothing(monkeypatch):
    file = StringIO()
    shown(Console(file=file, quiet=True), [3.0, 30.0], monkeypatch, [1, 400])
    assert file.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sentence_ends_its_lines_between_words_and_keeps_long_words(terminal):
    file = StringIO()
    console = Console(file=file, width=40, force_terminal=terminal, color_system=None)
    path = "/a/very/long/path/of/more/than/forty/columns/model"
    say(console, f"the model, metrics and [pictures] are in {path}")
    lines = file.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines) == f"the model, metrics and [pictures] are in {path}"
    assert len(lines) == (2 if terminal else 1)


COMMANDS = {
    "arithmetic": ["ppo_fast.examples.arithmetic"],
    "rlhf": ["ppo_fast.examples.rlhf"],
    "sampling": ["ppo_fast.examples.sampling", "--model", "m", "--prompts", "p.jsonl"],
    "train": ["ppo_fast.cli", "train", "--model", "m", "--prompts", "p.jsonl", "--out", "out"],
    "label": ["ppo_fast.cli", "label", "p.jsonl", "--out", "pairs.jsonl"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_what_it_does_before_slow_imports(name, tmp_path):
    """A stand-in for torch ends the process when it is imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "torch is imported"
    (line,) = done.stdout.splitlines()
    assert "importing" in line
    assert "transformers" in line
    assert "takes some seconds" in line
