"""Times of two commits side by side: blocks of calls in two processes, which alternate.

    git worktree add ../before HASH
    python bench/commits.py ../before [--workload losses ...] [--restarts N] [--pairs N] [--out FOLDER]

The workloads are those of wait_policy.py, which both commits must have; the folder given is the older one, the newer
one is this checkout. A ratio is the time of a block here over that of its neighbour there. Where memory lies differs
from process to process, which changes short workloads by more than a commit does: hence several restarts. Run it on a
machine with nothing else to do.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from json_lines import Writer
from static import git
from wait_policy import WORKLOADS

from ppo_fast.common.text import markdown_table
from ppo_fast.common.threads import PASSIVE

HERE = Path(__file__).parents[1]
# glibc keeps the memory that a call frees; else some processes, by chance, get new pages from the system in each call
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
OUT = HERE / "bench" / "results" / "cpu-2core" / "commits"
CHILD = """
import sys, time
sys.path.insert(0, "bench")
import wait_policy
call, seconds = wait_policy.WORKLOADS[sys.argv[1]](), float(sys.argv[2])
for _ in range(3):
    call()
print("ready", flush=True)
for _ in sys.stdin:
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    print(passed / calls, flush=True)
"""


class Process:
    """A process of one checkout that runs blocks of a workload on demand."""

    def __init__(self, checkout: Path, workload: str, seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, workload, str(seconds)],
            cwd=checkout,
            env={**os.environ, **PASSIVE, **KEEP_MEMORY, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._line() != "ready":
            sys.exit(f"{workload} failed in {checkout}")

    def block(self) -> float:
        """Run a block and return the mean seconds of a call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        return self.process.stdout.readline().strip()


def ratios(workload: str, before: Path, *, pairs: int, seconds: float) -> tuple[list[float], list[float]]:
    """Return the seconds of a call in each block, before and now."""
    processes = [Process(checkout, workload, seconds) for checkout in (before, HERE)]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(processes[which].block())
    for process in processes:
        process.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the older commit")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a block (default: 0.4)")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    before = given.before.resolve()
    old = subprocess.run(["git", "rev-parse", "HEAD"], cwd=before, capture_output=True, text=True, check=True)
    writer = Writer(given.out / "commits.jsonl", git("rev-parse", "HEAD"))
    rows = []
    for workload in given.workload:
        found: list[float] = []
        medians = []
        for restart in range(given.restarts):
            load = round(os.getloadavg()[0], 2)
            then, now = ratios(workload, before, pairs=given.pairs, seconds=given.seconds)
            row = {"workload": workload, "before": old.stdout.strip(), "restart": restart, "load_before": load}
            writer.add({**row, "seconds_before": then, "seconds_now": now})
            paired = [b / a for a, b in zip(then, now, strict=True)]
            found += paired
            medians.append(statistics.median(paired))
        low, _, high = statistics.quantiles(found, n=4)
        spread = f"{min(medians):.2f} to {max(medians):.2f}"
        rows.append([workload, f"{statistics.median(found):.3f}", f"{low:.2f} to {high:.2f}", spread])
    table = markdown_table(("workload", "median ratio", "quartiles", "medians of restarts"), rows, align="---:")
    print(table)
    (given.out / "README.md").write_text(
        f"# Two commits side by side\n\nMade by `python bench/commits.py`, against {old.stdout.strip()[:7]}:"
        f" {given.restarts} restarts of {given.pairs} pairs;\nraw figures in commits.jsonl.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
