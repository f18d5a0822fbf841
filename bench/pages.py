"""Run the commands of the Markdown pages in a fresh clone and a fresh virtual environment, and record each exit status.

python bench/pages.py [--limit 300] [--pages README.md ...]    # bench/results/cpu-2core/pages/commands.jsonl

Placeholders are replaced: DIR by a small Llama with its tokenizer, JUDGE a small reward model, FILE.jsonl and
answers.jsonl data, rewards.py the README's reward. Not run: commands that need a GPU, other machines or an environment
of their own (the page says so), and those with a record of their own (OWN_RECORD).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from json_lines import Writer
from static import git

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]  # to run from a checkout that is not installed

from support.pages import Command, all_commands  # noqa: E402

OUT = ROOT / "bench" / "results" / "cpu-2core" / "pages" / "commands.jsonl"
OWN_RECORD = {
    "python -m ppo_fast.examples.arithmetic": "bench/results/cpu-2core/arithmetic",
    "python -m ppo_fast.examples.rlhf": "bench/results/cpu-2core/rlhf",
    "python -m ppo_fast.examples.rlhf --pairs pairs.jsonl": "tests/examples/test_rlhf.py, with fewer steps",
    "pytest": "CI",
    "pytest tests/accelerator": "CI",
    "pytest --architecture sm_120 tests/kernels/test_gae.py": "bench/results/compiled",
    "pytest --ptx-seed 7": "bench/results/compiled",
    "python tests/ptx/architectures.py --write": "bench/results/compiled",
    "python tests/ptx/mutations.py --write": "bench/results/compiled",
    ".ci/check": "CI",
    "python bench/report.py runs/bench/record.jsonl": "CI",
    "pytest -n auto --dist loadfile": "CI",
    ".ci/run": "CI",
    "pytest bench --size small --record runs/bench/record.jsonl": "CI",
}
MATERIAL = """
import json, sys
sys.path.insert(0, "tests")
from support.tiny import byte_tokenizer, save_tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification
save_tiny_model("DIR")
tokenizer = byte_tokenizer()
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
options = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
LlamaForSequenceClassification(LlamaConfig(**size, **options)).save_pretrained("JUDGE")
tokenizer.save_pretrained("JUDGE")
with open("FILE.jsonl", "w") as file:
    for i in range(64):
        a, b = 10 + i, 99 - i
        print(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}), file=file)
with open("questions.jsonl", "w") as file:
    file.write(open("FILE.jsonl").read().replace("prompt", "question"))
with open("answers.jsonl", "w") as file:
    print(json.dumps({"prompt": "1+1=", "answers": ["2", "3"]}), file=file)
with open("rewards.py", "w") as file:
    print("def correct(prompts, completions, answer):", file=file)
    print("    return [float(a in text) for a, text in zip(answer, completions, strict=True)]\\n\\n", file=file)
    print("def runs_the_tests(prompts, completions):", file=file)
    print("    return [float(text.isdigit()) for text in completions]", file=file)
"""


def skipped(command: Command) -> str:
    """Return the reason why a command is not run, or ""."""
    if command.mark:
        return command.mark
    own = (record for text, record in OWN_RECORD.items() if command.text.split(" && ")[-1].strip() == text)
    return next((f"its record is {record}" for record in own), "")


def run(command: Command, clone: Path, environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Seconds and exit status of a command; a training run gets a few steps only."""
    text = command.text
    if "--prompt-field question" in text:
        text = text.replace("FILE.jsonl", "questions.jsonl")
    if "ppo-fast train" in text or "ppo_fast.cli train" in text:
        text += " --total-steps 2 --prompts-per-step 8 --max-new-tokens 8 --overwrite"
    start = time.perf_counter()
    try:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=clone,
            env=environment,
            input="1\n" * 4,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "over the limit", "seconds": limit}
    last = (done.stdout + done.stderr).strip().splitlines()[-3:]
    row: dict[str, Any] = {"status": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
    return row | ({"last_lines": last} if done.returncode else {}) | ({"run_as": text} if text != command.text else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=300, help="seconds of a command (default: 300)")
    parser.add_argument("--pages", nargs="+", default=None, help="pages, such as README.md (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/environment"], check=True)
        path = f"{folder}/environment/bin{os.pathsep}{os.environ['PATH']}"
        environment = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        install = 'pip install -q -c constraints.txt -e ".[train,cpu,peft,classic,rewards,data,gguf,test,bench,dev]"'
        subprocess.run(["bash", "-c", install], cwd=clone, env=environment, check=True)
        subprocess.run(["python", "-c", MATERIAL], cwd=clone, env=environment, check=True)
        writer = Writer(OUT, git("rev-parse", "HEAD"))
        failed, page = 0, ""
        for command in all_commands():
            if command.page != page:  # a page does not depend on what another one has written
                page = command.page
                shutil.rmtree(clone / "runs", ignore_errors=True)
            if options.pages and command.page not in options.pages:
                continue
            why = skipped(command)
            row = {"not_run": why} if why else run(command, clone, environment, options.limit)
            failed += row.get("status", 0) != 0
            writer.add({"page": command.page, "command": command.text, **row})
            print(f"{why or row['status']}: {command.page}: {command.text}", flush=True)
    print(f"{failed} failed; the record is {OUT}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
