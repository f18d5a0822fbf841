"""What the with_* examples have in common; the other projects need not be installed."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppo_fast import examples
from ppo_fast.examples import beside

FOLDER = Path(examples.__file__).parent
MODULES = sorted(file.stem for file in FOLDER.glob("with_*.py"))
PEERS = {"with_sb3": "sb3", "with_torchrl": "torchrl", "with_trl": "trl"}  # with a line for every machine


def source(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def constant(tree: ast.Module, name: str):
    """The value of a name that a module assigns at its top level."""
    assigned = [x for x in tree.body if isinstance(x, ast.Assign) and getattr(x.targets[0], "id", None) == name]
    return ast.literal_eval(assigned[0].value)


def run(name: str, before: str) -> subprocess.CompletedProcess:
    """The example as a script in a process of its own, after some lines of Python."""
    code = f"import sys, runpy\n{before}\nrunpy.run_module('ppo_fast.examples.{name}', run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("name", MODULES)
def test_an_example_says_what_it_does_before_it_imports_torch(name):
    found = run(name, "sys.argv = ['x']; sys.modules['torch'] = None")
    assert len(found.stdout.splitlines()) == 1
    assert re.search("PPO|GRPO", found.stdout)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_project_is_one_sentence_with_the_line_that_installs_it(name):
    hide = (
        "import importlib.metadata as metadata\nsys.argv = ['x']\n"
        "def version(name, real=metadata.version):\n"
        "    if name in ('stable-baselines3', 'torchrl', 'trl'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version"
    )
    found = run(name, hide)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert re.match(rf'{name}: error: this (integration|example) needs .*pip install .*"\S+==[\d.]+\*"', line)


@pytest.mark.parametrize("name", MODULES)
def test_the_docstring_names_the_line_that_installs_what_the_example_needs(name):
    tree = source(name)
    lines = [line.strip() for line in str(ast.get_docstring(tree)).splitlines()]
    place = lines.index(constant(tree, "INSTALL"))
    assert lines[place + 1].startswith(f"python -m ppo_fast.examples.{name}")


@pytest.mark.parametrize("name", [x for x in MODULES if x not in ("with_cleanrl", "with_liger", "with_verl")])
def test_an_example_installs_the_version_that_its_integration_was_tested_with(name):
    integration = FOLDER.parent / "integrations" / f"{name.removeprefix('with_')}.py"
    tested = constant(ast.parse(integration.read_text(encoding="utf-8")), "TESTED")
    assert f"=={tested[0]}*" in constant(source(name), "INSTALL")


def test_progress_shows_each_tenth_and_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = beside.Progress("step", 50)
    for done in range(51):
        now[0] = 3.0 * done
        progress.show(done)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0].split() == ["step", "0/50"]
    assert lines[1] == "step 5/50  2:15 left"
    assert lines[-1] == "step 50/50  0:00 left"


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    progress = beside.Progress("step", 4)
    for done in range(5):
        progress.show(done)
    *unfinished, last = capsys.readouterr().err.split("\r")[1:]
    assert [x.count("#") for x in unfinished] == [0, 2, 5, 7]
    assert last.startswith("step [##########] 4/4")
    assert last.endswith("\n")
    assert {len(x) for x in unfinished} == {39}


def test_an_error_ends_with_the_line_that_installs_what_is_missing(capsys):
    assert beside.failed("with_x", ImportError("No module named 'y'"), "pip install y") == 1
    assert capsys.readouterr().err == "with_x: error: No module named 'y': pip install y\n"
    beside.failed("with_x", ImportError("y is old: pip install z"), "pip install y")
    assert capsys.readouterr().err == "with_x: error: y is old: pip install z\n"
