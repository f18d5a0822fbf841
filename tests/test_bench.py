"""The benchmarks run before a GPU minute is spent on them: a dry run with tiny shapes, kernels in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).parent.parent


def on_gpu(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "bench/on_gpu.sh", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def parts() -> list[str]:
    lines = (ROOT / "bench" / "on_gpu.sh").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("bench ")]


@pytest.mark.parametrize("part", parts())
def test_dry_run_of_each_gpu_part_leaves_a_complete_record(tmp_path: Path, part: str):
    done = on_gpu(tmp_path, part, "0123abc", "tiny", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / f"{part}.json").read_text())
    assert record["commit_info"]["id"] == "0123abc"
    assert record["machine_info"]["versions"]["torch"]
    ours = [row["extra_info"] for row in record["benchmarks"] if row["extra_info"]["provider"].startswith("ppo_fast")]
    assert ours
    for info in ours:
        assert len(info["samples_ms"]) >= 5
        assert info["bytes"] > 0
        assert info["max_error"] < 1e-3
        assert info["peak_extra_bytes"] >= 0


def test_the_report_takes_a_record_without_commit_or_leaves_out_a_row(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra ppo_fast[bench])")
    record = tmp_path / "gae.json"
    sizes = ["--size", "tiny", "--commit", "0123abc", "--benchmark-json", str(record), "--benchmark-save-data"]
    command = [sys.executable, "-m", "pytest", "bench/bench_gae.py", "-q", "-p", "no:cacheprovider", *sizes]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)

    def report() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "bench/report.py", str(record)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert report().returncode == 0
    page = (tmp_path / "README.md").read_text()
    rows = json.loads(record.read_text())["benchmarks"]
    assert page.count("| ppo_fast |") == len({row["group"] for row in rows})
    assert "commit 0123abc" in page
    assert (tmp_path / "gae.png").stat().st_size > 1000
    broken = json.loads(record.read_text())
    broken["commit_info"]["id"] = "unknown"
    record.write_text(json.dumps(broken))
    done = report()
    assert done.returncode == 1
    assert "lacks the commit" in done.stderr


def test_a_failing_part_is_kept_and_told_by_the_exit_status(tmp_path: Path):
    done = on_gpu(tmp_path, "rows", "0123abc", "no such size")
    assert done.returncode != 0
    assert "no such size" in (tmp_path / "rows.log").read_text()


def test_an_unknown_part_is_refused(tmp_path: Path):
    done = on_gpu(tmp_path, "everything")
    assert done.returncode == 2
    assert "the parts are tests, rows" in done.stderr
