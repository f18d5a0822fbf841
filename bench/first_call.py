"""Seconds of the first calls of the operations for a CPU, in several processes that start together.

    python bench/first_call.py --workers 8

Two rounds, each in new processes that wait for one another after `import torch, ppo_fast`: without numba's cache, and
with one that `ppo-fast compile` has filled. A record has the seconds of `gae` (which includes the import of numba), and
of `ppo_loss` and `rlhf_advantages` after it: those of the slowest process and of all. It is written to
bench/results/cpu-2core/first_call/8-workers.jsonl, or as --out says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from json_lines import Writer

WORKER = """
import json, os, sys, time
import torch, ppo_fast as ppo
ppo.gae, torch.set_num_threads(1)
x, scores, mask = torch.randn(4, 16, 32), torch.randn(16), torch.ones(16, 32, dtype=torch.bool)
print("ready", flush=True)
sys.stdin.readline()
times = [time.perf_counter()]
ppo.gae(x[0], x[1])
times.append(time.perf_counter())
ppo.ppo_loss(x[0], x[1], x[2], x[3], x[0], x[1])
times.append(time.perf_counter())
ppo.rlhf_advantages(scores, x[0], x[1], x[2], mask)
times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "cpu-2core" / "first_call"
CALLS = ("gae", "ppo_loss", "rlhf_advantages")


def first_calls(workers: int, environment: dict[str, str]) -> list[list[float]]:
    """Seconds of each call in each process; all make the first one at the same time."""
    made = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(workers)
    ]
    for process in made:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in made:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0]) for process in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--workers", type=int, default=8, help="processes that start together (default: 8)")
    parser.add_argument("--out", type=Path, help="file of records")
    options = parser.parse_args()
    out = options.out or OUT / f"{options.workers}-workers.jsonl"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    writer = Writer(out, commit.stdout.strip())
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("none", "of ppo-fast compile"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            environment["NUMBA_CACHE_DIR"] = f"{folder}/{cache}"
            seconds = 0.0
            if cache == "of ppo-fast compile":
                start = time.perf_counter()
                command = [sys.executable, "-m", "ppo_fast.cli", "compile"]
                subprocess.run(command, check=True, env=environment, capture_output=True)
                seconds = time.perf_counter() - start
            found = first_calls(options.workers, environment)
            slowest = {name: max(row[i] for row in found) for i, name in enumerate(CALLS)}
            row = {"workers": options.workers, "cache": cache, "compile_seconds": seconds, "slowest": slowest}
            writer.add({**row, "seconds": found})
            text = ", ".join(f"{name} {value:.2f} s" for name, value in slowest.items())
            print(f"{options.workers} processes, cache {cache}: {text}", flush=True)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
