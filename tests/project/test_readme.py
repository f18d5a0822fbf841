"""The README's commands work in the order in which they stand; its first table is the result of its first command."""

import json
import re
import tomllib
from pathlib import Path

import arithmetic as recorded
import pytest
import yaml

from ppo_fast import recipes

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# What a line of code needs besides the package itself
NEEDS = {
    r"ppo-fast (train|label|memory)|ppo_fast\.cli train|ppo_fast\.trainer": {"train"},
    r"--lora-rank": {"peft"},
    r"\.parquet": {"data"},
    r"ppo-fast recipe|ppo_fast\.rewards:|ppo_fast\.examples\.rlhf": {"train", "rewards"},
    r"ppo_fast\.examples\.(arithmetic|sampling)": {"train"},
    r"ppo-fast classic|ppo_fast\.examples\.classic": {"classic"},
    r"^pytest bench|&& pytest bench|bench/report\.py": {"bench"},
    r"&& pytest -n": {"test", "train", "cpu", "peft", "classic", "rewards", "data"},
    r"flash-attn": {"train"},
}
INSTALL = re.compile(r'pip install (?:-c constraints\.txt )?-e "\.\[([\w,]+)\]"')


def sections() -> dict[str, list[str]]:
    """The lines of code of each section, in their order; comments are left out."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
        lines = [line.split("  #")[0] for block in blocks for line in block.splitlines() if line.strip()]
        if lines:
            found[part.splitlines()[0]] = lines
    return found


@pytest.mark.parametrize("title", sections())
def test_each_section_begins_with_the_install_of_what_its_commands_need(title):
    lines = sections()[title]
    assert INSTALL.search(lines[0]), f"{title!r} begins with {lines[0]!r}"
    installed: set[str] = set()
    for line in lines:
        for names in INSTALL.findall(line):
            installed |= set(names.split(","))
        assert installed <= set(EXTRAS)
        needed = set().union(*(extras for pattern, extras in NEEDS.items() if re.search(pattern, line)))
        if "memory --model" in line:
            needed -= {"peft"}  # which calculates LoRA without peft
        assert needed <= installed, f"{line!r} needs {needed - installed}"


@pytest.mark.parametrize("title", [title for title in sections() if not title.startswith("# ")])
def test_each_section_installs_before_it_explains(title):
    part = TEXT.split(f"\n## {title}\n")[1]
    assert part.startswith("\n```bash\npip install "), f"{title!r} begins with {part[:80]!r}"


def test_the_extra_of_the_recipes_has_the_packages_of_their_rewards():
    packages = {"rouge_l": "rouge-score", "bleu": "sacrebleu", "chrf": "sacrebleu", "json_schema": "jsonschema"}
    used = set()
    for name in recipes.NAMES:
        text = (Path(recipes.__file__).parent / name / "recipe.yaml").read_text(encoding="utf-8")
        used |= {spec.partition("(")[0].rpartition(":")[2] for spec in yaml.safe_load(text)["reward"]}
    assert {packages[name] for name in used if name in packages} <= set(EXTRAS["rewards"])
    assert {"rouge_l", "bleu", "chrf"} <= used


def test_the_first_table_is_the_record_of_the_first_command():
    first = next(iter(sections().values()))[0].split(" && ")[-1]
    header, row = (json.loads(x) for x in (recorded.OUT / "seed-0.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["command"] == first == recorded.command(row["seed"])
    assert recorded.table(row) in TEXT
    assert header["machine_info"]["threads"] >= 1
    assert header["machine_info"]["cpu"]["brand_raw"]
    assert row["load_before"] >= 0
    assert row["seconds"] > row["seconds_supervised"] > 0
    assert "(bench/results/cpu-2core/arithmetic/seed-0.jsonl)" in TEXT
