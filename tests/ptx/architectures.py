"""All kernel tests on compiled code for other architectures than the one of CI.

    python tests/ptx/architectures.py [--architectures sm_80 sm_89 ...] [--jobs 2] [--write] [pytest arguments]

Runs the test files that launch kernels once for each architecture, and prints how many tests launched each variant and
how many issues were found. --write keeps one table for each architecture in bench/results/compiled/.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import triton  # noqa: E402
from ptx.emulator import ARCHITECTURES  # noqa: E402
from ptx.record import RESULTS, commit, markdown_table, provenance, read_counts  # noqa: E402

FILES = ("test_variants", "test_logprobs*", "test_loss*", "test_gae*", "test_advantages*", "test_linear*")
PAGE = """# Kernel tests on compiled code for {architecture}

Made by `python tests/ptx/architectures.py --architectures {architecture} --write`. {provenance}.

{verdict} ({seconds:.0f} s). A case is a test that launched the variant.

{table}
"""


def run(architecture: str, jobs: int, arguments: list[str]) -> tuple[int, str, dict[tuple[str, str], tuple[int, int]]]:
    """Exit status and last line of pytest, and the counts of each variant."""
    files = sorted({str(path) for name in FILES for path in (ROOT / "tests").rglob(f"{name}.py")})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "--architecture", architecture]
        command += ["--ptx-record", folder, "-p", "no:cacheprovider", *(arguments or files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
        return done.returncode, done.stdout.strip().splitlines()[-1].strip("= "), read_counts(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in ARCHITECTURES if name != "sm_90"]
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=others)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the tables")
    options, arguments = parser.parse_known_args()
    worst = 0
    for architecture in options.architectures:
        start = time.perf_counter()
        status, verdict, counts = run(architecture, options.jobs, arguments)
        worst = max(worst, status)
        rows = [
            [kernel, variant, architecture, str(cases), str(issues), f"triton {triton.__version__}", commit()]
            for (kernel, variant), (cases, issues) in sorted(counts.items())
        ]
        columns = ["kernel", "variant", "architecture", "cases run", "issues found", "compiler", "commit"]
        seconds = time.perf_counter() - start
        print(f"{architecture}: {verdict}; {len(rows)} variants, {sum(int(row[4]) for row in rows)} issues")
        if options.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            text = PAGE.format(
                architecture=architecture,
                provenance=provenance(),
                verdict=verdict,
                seconds=seconds,
                table=markdown_table(columns, rows),
            )
            (RESULTS / f"{architecture}.md").write_text(text, encoding="utf-8")
    return worst


if __name__ == "__main__":
    sys.exit(main())
