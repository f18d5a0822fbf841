"""The language of the project: standard technical English, without the phrases that earlier versions had."""

import re
import subprocess
from pathlib import Path

import pytest
from support.pages import ROOT

# What not to write, and what to write instead
PHRASES = {
    r"\bgoes on\b|\bgo on\b": "continues, resumes",
    r"\bnobody\b": "no process, no user, nothing",
    r"\brivals?\b": "other projects, baselines",
    r"\bis gone\b": "does not exist any more",
    r"\bis told\b": "receives",
    r"\blies (in|between|behind|there)\b|\blie (in|between)\b": "is in, is between",
    r"\bshall\b": "must",
    r"\bin the place of\b": "instead of",
    r"\bstands?\b(?! for| in for|-in)": "is",
    r"\bcomes? along\b|\bcame along\b": "is included",
    r"\botherwise than\b": "differently from",
    r"\bnot a word\b|\bin silence\b": "without a warning",
    r"\bsaid nowhere\b|\bby name\b(?=,? (the|is skipped|rejected))": "with an error that names it",
    r"\bjudged here\b|\bjudges the\b": "evaluates the",
}
ALLOWED = {"tests/project/test_language.py"}


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("git does not know this tree (an unpacked sdist): no list of tracked files")
    kinds, names = (".py", ".md", ".yaml", ".sh", ".toml", "run", "check"), listed.splitlines()
    return [ROOT / x for x in names if x.endswith(kinds) and not x.startswith("bench/results/") and x not in ALLOWED]


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_that_are_no_standard_english_do_not_occur(phrase: str):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files()
        if file.is_file() and not file.is_symlink()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(phrase, line, flags=re.IGNORECASE)
    ]
    assert not found, f"write {PHRASES[phrase]!r} instead:\n" + "\n".join(found)
