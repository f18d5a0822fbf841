"""Waiting threads of commands, examples and benchmarks sleep; runs print their number of threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_fast.common import threads
from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    "rlhf",
    *(x.stem for x in (ROOT / "ppo_fast/examples").glob("[a-z]*.py") if "def main(" in x.read_text(encoding="utf-8")),
]
BENCHMARKS = [  # without those of pytest bench, host_time (one thread) and wait_policy (which measures both)
    x.stem
    for x in sorted((ROOT / "bench").glob("*.py"))
    if "import torch" in x.read_text()
    and not x.stem.startswith(("bench_", "conftest", "measure", "host_time", "wait_policy"))
]
COMMANDS = {
    "train": ["ppo_fast.cli", "train", "--model", ".", "--prompts", "p.jsonl", "--reward", "math:sqrt"],
    "classic": ["ppo_fast.cli", "classic", "--help"],
    "doctor": ["ppo_fast.cli", "doctor"],
    **{f"example {name}": [f"ppo_fast.examples.{name}"] for name in sorted(EXAMPLES)},
    **{f"bench {name}": [str(ROOT / "bench" / f"{name}.py")] for name in BENCHMARKS},
    "pytest bench": ["pytest", str(ROOT / "bench" / "bench_gae.py"), "--collect-only", "-s", "-p", "no:cacheprovider"],
}
# Run a module or a file up to the import of torch, and print the wait policy at this moment
UP_TO_TORCH = """
import os, runpy, sys
class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtTorch())
name, *sys.argv[1:] = sys.argv[1:]
if name.endswith(".py"):
    sys.path.insert(0, os.path.dirname(name))
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def policy_at_torch(command: list[str], folder: Path, **environment: str) -> str:
    (folder / "p.jsonl").write_text('{"prompt": "2+2="}\n')
    inherited = {k: v for k, v in os.environ.items() if k not in (threads.POLICY, "GOMP_SPINCOUNT", "PYTHONPATH")}
    paths = os.pathsep.join(str(ROOT / x) for x in (".", "tests", "bench"))
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_TORCH, *command],
        cwd=folder,
        env={**inherited, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_waiting_threads_sleep_in_every_command_example_and_benchmark(name: str, tmp_path: Path):
    assert policy_at_torch(COMMANDS[name], tmp_path) == "PASSIVE 1000"


def test_the_users_own_wait_policy_is_kept(tmp_path: Path):
    assert policy_at_torch(COMMANDS["train"], tmp_path, OMP_WAIT_POLICY="active") == "active None"
    assert policy_at_torch(COMMANDS["train"], tmp_path, GOMP_SPINCOUNT="1000") == "None 1000"


def test_importing_the_operations_leaves_the_environment_alone(tmp_path: Path):
    code = "import ppo_fast as ppo, os; ppo.gae; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k != threads.POLICY} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "None"


def test_the_tests_themselves_run_with_sleeping_threads():
    assert os.environ.get(threads.POLICY) is not None or "GOMP_SPINCOUNT" in os.environ


def test_the_note_names_the_number_of_threads_and_a_policy_that_keeps_cores_busy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv(threads.POLICY, "passive")
    assert threads.threads_note() == "2 threads"
    monkeypatch.delenv(threads.POLICY)
    assert threads.threads_note() == (
        "2 threads; while they wait they keep their cores busy (OMP_WAIT_POLICY = unset): on a shared machine set"
        " GOMP_SPINCOUNT=1000 before torch is imported"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.threads_note() == "1 thread"


def test_the_benchmark_of_the_wait_policy_compares_both_policies(tmp_path: Path):
    command = [sys.executable, "bench/wait_policy.py", str(tmp_path / "out"), "--rounds", "1", "--seconds", "0.01"]
    command += ["--workload", "gae (numba)", "--condition", "quiet", "copies", "--commit", "abc1234567"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/wait_policy.jsonl").read_text().splitlines()[1:]]
    assert [(row["condition"], row["policy"]) for row in rows] == [
        *[("quiet", "after"), ("quiet", "before")],
        *[("copies", "after")] * 2,
        *[("copies", "before")] * 2,
    ]
    assert all(0 < row["mean"] < 60 and row["calls"] >= 1 for row in rows)
    page = (tmp_path / "out/README.md").read_text()
    assert "| gae (numba) |" in page
    assert "commit abc1234," in page


@pytest.mark.parametrize("count", [-1, 100_000, 10**12])
def test_a_number_of_threads_that_no_machine_has_is_rejected(count):
    """PyTorch itself fails with a traceback, or starts as many threads as are asked for."""
    with pytest.raises(UserError, match=rf"threads must be in \[0, 4096\], got {count}"):
        PPOConfig(threads=count)
