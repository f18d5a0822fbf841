"""The Markdown pages: every command can be parsed, every link resolves, and tables are those of records."""

import argparse
import ast
import contextlib
import importlib
import json
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import example_runs as recorded
import pytest
import yaml
from support.pages import ROOT, Command, all_commands, anchors, blocks, commands, links, pages, sections

from ppo_fast import recipes
from ppo_fast.cli.commands import build_parser

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# What a line of code needs besides the package itself
NEEDS = {
    r"ppo-fast (train|label|memory)|ppo_fast\.cli train": {"train"},
    r"--lora-rank": {"peft"},
    r"\.parquet": {"data"},
    r"ppo-fast recipe|ppo_fast\.rewards:|ppo_fast\.examples\.rlhf": {"train", "rewards"},
    r"ppo_fast\.examples\.(arithmetic|sampling)": {"train"},
    r"ppo_fast\.examples\.pretrained": {"train", "gguf"},
    r"ppo-fast classic|ppo_fast\.examples\.classic": {"classic"},
    r"^pytest bench|&& pytest bench|bench/report\.py": {"bench"},
    r"&& pytest -n": {"test", "train", "cpu", "peft", "classic", "rewards", "data"},
    r"flash-attn": {"train"},
}
INSTALL = re.compile(r'pip install (?:-c constraints\.txt )?-e "\.\[([\w,]+)\]"')


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_is_at_most_150_lines_of_125_columns():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 125]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_resolve(page: Path):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_python_blocks_compile_and_their_imports_exist(page: Path):
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ppo_fast."):
                with contextlib.suppress(ModuleNotFoundError):  # the peer of an integration may be missing
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_loop_of_the_readme_runs():
    (block,) = blocks(sections(TEXT)["In your own loop"], "python")
    exec(compile(block, "README.md", "exec"), {})


def check_ppo_fast(words: list[str]) -> None:
    parser, _ = build_parser()
    if words[0] == "classic":
        from ppo_fast.classic.config import add_arguments

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        words = words[1:]
    with pytest.raises(SystemExit) if "--help" in words else contextlib.nullcontext():
        _, unknown = parser.parse_known_args(words)
        assert not unknown


def check_module(words: list[str]) -> None:
    """`python -m NAME options`: the module exists, and its help has the options."""
    assert find_spec(words[0]), words[0]
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    if options and words[0] != "pytest":
        done = subprocess.run(
            [sys.executable, "-m", words[0], "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not [option for option in options if option not in done.stdout]


def check_script(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words[0]
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    assert not [option for option in options if f'"{option}"' not in source]


def check(words: list[str]) -> None:
    """A command without its environment: whether what it names exists."""
    program, *rest = words
    program = Path(program).name
    if program == "pip":
        assert rest[0] in ("install", "download")
        for extras in INSTALL.findall(" ".join(["pip", *(f'"{w}"' if "[" in w else w for w in rest)])):
            assert set(extras.split(",")) <= set(EXTRAS)
        files = [rest[i + 1] for i, word in enumerate(rest) if word in ("-c", "-r")]
        assert all((ROOT / file).is_file() for file in files)
    elif program == "ppo-fast":
        check_ppo_fast(rest)
    elif program == "torchrun":
        assert rest[rest.index("-m") + 1] == "ppo_fast.cli"
        check_ppo_fast(rest[rest.index("-m") + 2 :])
    elif program.startswith("python"):
        if rest[0] == "-m" and rest[1] != "venv":
            check_module(rest[1:])
        elif rest[0] != "-m":
            check_script(rest)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith(("tests", "bench")) and "::" not in word)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    else:
        assert (ROOT / words[0]).is_file() or program in ("cd", "git", "ls", "cp", "mkdir"), (
            f"unknown command {words[0]}"
        )


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_commands_can_be_parsed(command: Command):
    for words in command.parts():
        check(words)


@pytest.mark.parametrize("title", [title for title, part in sections(TEXT).items() if blocks(part, "bash")])
def test_sections_of_the_readme_install_what_their_commands_need(title: str):
    lines = [command for command in commands(README) if command.section == title]
    assert INSTALL.search(lines[0].text), f"{title!r} begins with {lines[0].text!r}"
    installed: set[str] = set()
    for line in lines:
        for names in INSTALL.findall(line.text):
            installed |= set(names.split(","))
        needed = set().union(*(extras for pattern, extras in NEEDS.items() if re.search(pattern, line.text)))
        assert needed <= installed, f"{line.text!r} needs {needed - installed}"


def test_the_extra_of_the_recipes_has_the_packages_of_their_rewards():
    packages = {"rouge_l": "rouge-score", "bleu": "sacrebleu", "chrf": "sacrebleu", "json_schema": "jsonschema"}
    used = set()
    for name in recipes.NAMES:
        text = (Path(recipes.__file__).parent / name / "recipe.yaml").read_text(encoding="utf-8")
        used |= {spec.partition("(")[0].rpartition(":")[2] for spec in yaml.safe_load(text)["reward"]}
    assert {packages[name] for name in used if name in packages} <= set(EXTRAS["rewards"])
    assert {"rouge_l", "bleu", "chrf"} <= used


def test_the_first_table_is_the_record_of_the_first_command():
    first = commands(README)[0].text.split("&&")[-1].strip()
    record = recorded.RESULTS / "pretrained" / "seed-0.jsonl"
    header, row = (json.loads(x) for x in record.read_text(encoding="utf-8").splitlines())
    assert row["command"] == first
    assert recorded.table("pretrained", row) in TEXT
    assert row["exact_match_before"] <= 0.4
    assert row["exact_match_after"] >= 0.85
    assert header["machine_info"]["threads"] >= 1
    assert header["machine_info"]["cpu"]["brand_raw"]
    assert row["load_before"] >= 0
    assert "(bench/results/cpu-2core/pretrained/seed-0.jsonl)" in TEXT
    assert "(bench/results/cpu-2core/pretrained/seed-0.png)" in TEXT


def test_the_picture_of_the_layers_shows_the_imports_of_today():
    layers = runpy.run_path(str(ROOT / "bench" / "layers.py"))
    shown = json.loads((ROOT / "bench" / "results" / "layers" / "layers.json").read_text(encoding="utf-8"))
    assert shown == layers["described"](), "python bench/layers.py makes the picture again"
    for name, imported in shown["imports"]:
        if (name, imported) not in (("doctor", "kernels"), ("llm", "kernels")):
            assert layers["BRICKS"][imported][3] < layers["BRICKS"][name][2], f"{name} imports {imported}"
