"""Dry runs of the benchmarks on a pretended GPU, with compiled kernels in the PTX interpreter; and the report, which
shows what a record holds, also where a baseline is better."""

import copy
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).parent.parent

import measure  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402

import ppo_fast as ppo  # noqa: E402


def outside_xdist() -> dict[str, str]:
    """The environment without pytest-xdist's variables, in which pytest-benchmark would measure nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def on_gpu(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "bench/on_gpu.sh", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**outside_xdist(), "PATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def parts() -> list[Any]:
    lines = (ROOT / "bench" / "on_gpu.sh").read_text().splitlines()
    names = [line.split()[1] for line in lines if line.startswith("bench ")]
    return [pytest.param(name, marks=[pytest.mark.slow] * (name == "learn")) for name in names]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")
@pytest.mark.parametrize("part", parts())
def test_dry_run_of_each_gpu_part_leaves_a_complete_record(tmp_path: Path, part: str):
    pretended = {"PYTHONPATH": f"bench{os.pathsep}tests", "PYTEST_ADDOPTS": "-p pretend_cuda"}
    done = on_gpu(tmp_path, part, "0123abc", "tiny", **pretended)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / f"{part}.json").read_text())
    assert record["commit_info"]["id"] == "0123abc"
    assert record["machine_info"]["versions"]["torch"]
    assert record["machine_info"]["gpu"]["name"]
    infos = [row["extra_info"] for row in record["benchmarks"]]
    ours = [info for info in infos if info["provider"].startswith("ppo_fast")]
    assert ours
    for info in infos:
        assert info["samples_ms"]
        assert info["bytes"] > 0
        assert info["floor_ms"] > 0
        assert info["share_of_floor"] > 0
        assert info["launches"] == 1  # of the three events that the pretended profiler saw
        assert info["peak_extra_bytes"] == 1
        assert "MiB are written" in info["l2"]
        assert ("gemm_tflop_per_s" in info) == (part in ("linear", "learn"))
        assert "replay_failed" not in info
    for info in ours:
        assert info["max_error"] < (1e-4 if info["dtype"] == "float32" else 0.1)
    if part in ("rows", "advantages"):
        small = [info for info in ours if info["operation"] != "token_logprobs and entropy, forward"]
        assert any(info.get("replay_ms") and info["call_us"] > 0 for info in small)
    if part == "learn":
        for info in infos:
            assert set(info["parts_ms"]) == {"advantages", "backbones", "head and loss", "clipping and AdamW"}


def test_a_failing_part_is_kept_and_told_by_the_exit_status(tmp_path: Path):
    done = on_gpu(tmp_path, "rows", "0123abc", "no such size")
    assert done.returncode != 0
    assert "no such size" in (tmp_path / "rows.log").read_text()


def test_an_unknown_part_is_refused(tmp_path: Path):
    done = on_gpu(tmp_path, "everything")
    assert done.returncode == 2
    assert "the parts are tests, rows" in done.stderr


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "--commit", "0123abc"]
    environment = {k: v for k, v in outside_xdist().items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def gae_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "gae.json"
    done = bench("bench/bench_gae.py", "--size", "tiny", "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout[-2000:]
    return json.loads(path.read_text())


def test_rows_beyond_the_budget_run_on_or_cost_the_record(tmp_path: Path):
    path = tmp_path / "gae.json"
    done = bench("bench/bench_gae.py", "--size", "tiny", "--budget", "0", "--benchmark-json", str(path), "-rs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "the budget of 0 s is spent" in done.stdout


def made(folder: Path, record: dict[str, Any]) -> tuple[int, str]:
    """Exit status of the report maker and the page, or nothing."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra ppo_fast[bench])")
    (folder / "record.json").write_text(json.dumps(record))
    status = report.main([str(folder / "record.json")])
    return status, (folder / "README.md").read_text() if status == 0 else ""


def test_the_report_leaves_out_a_row_or_says_not_where_it_comes_from(tmp_path: Path, gae_record: dict[str, Any]):
    status, page = made(tmp_path, gae_record)
    assert status == 0
    found = [row["extra_info"] for row in gae_record["benchmarks"]]
    assert page.count("| ppo_fast |") == len({row["group"] for row in gae_record["benchmarks"]})
    names = [info["provider"] for info in found]
    for name in set(names):
        assert page.count(f"| {name} |") == names.count(name)
    assert "commit 0123abc" in page
    assert f"torch {version('torch')}" in page
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == len({info["operation"] for info in found})


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("commit_info", "id"), "unknown", "lacks the commit"),
        (("commit_info",), {}, "lacks the commit"),
        (("machine_info", "versions"), {}, "lacks the versions"),
        (("machine_info",), {"versions": {"torch": "2"}}, "lacks the machine"),
        (("benchmarks",), [], "has no rows"),
    ],
)
def test_the_report_takes_a_record_without_its_source(tmp_path, capsys, gae_record, place, value, said):
    broken = copy.deepcopy(gae_record)
    target = broken
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    assert made(tmp_path, broken)[0] == 1
    assert said in capsys.readouterr().err


def synthetic(provider: str, n: int, ms: float, mib: float) -> dict[str, Any]:
    info = {"operation": "x", "provider": provider, "shape": f"N={n} V=8", "dtype": "float32", "bytes": 8 * n}
    info |= {"flops": 0, "samples_ms": [ms] * 5, "peak_extra_bytes": int(mib * 2**20), "copy_gb_per_s": 1.0}
    return info | {"floor_ms": 0.5, "share_of_floor": 0.5 / ms, "launches": 2}


def test_a_loss_of_ours_is_hidden(tmp_path: Path, gae_record: dict[str, Any]):
    """A rival is faster at N=1, needs less memory at N=2, we are better without x at N=4; a ceiling is no rival."""
    table = {1: [("ppo_fast", 2.0, 4), ("other", 1.0, 9)], 2: [("ppo_fast", 1.0, 4), ("other", 3.0, 1)]}
    table[4] = [("ppo_fast", 1.0, 4), ("one GEMM", 0.7, 0), ("ppo_fast without x", 0.8, 1)]
    found = [synthetic(name, n, ms, mib) for n, entries in table.items() for name, ms, mib in entries]
    record = gae_record | {"benchmarks": [{"extra_info": info} for info in found]}
    _, page = made(tmp_path, record)
    ahead = page.split("## Where we are behind")[1].split("\n## ")[0].strip().splitlines()
    assert ahead == [
        "- x, N=1 V=8, float32: other, 2.00 times as fast",
        "- x, N=2 V=8, float32: other, needs 1 instead of 4 MiB",
        "- x, N=4 V=8, float32: ppo_fast without x, 1.25 times as fast",
    ]
    assert "| other | **1 ms** | 1 ms ... 1 ms | 0.50 | 50 % |" in page
    assert (tmp_path / "x-against-N.png").stat().st_size > 1000


def test_a_sweep_is_no_picture_or_mixes_two_widths():
    found = [synthetic("ppo_fast", n, 1.0, 1.0) for n in (1, 2, 4)]
    assert [(axis, fixed) for axis, fixed, _ in plots.sweeps(rows.groups_of(found)["x"])] == [("N", {"V": 8})]
    found[2]["shape"] = "N=4 V=16"
    assert not list(plots.sweeps(rows.groups_of(found)["x"]))


def test_the_record_of_a_whole_program_is_refused_or_loses_its_medians(tmp_path: Path):
    record = {"date": "2026-11-21", "commit": "0123abc", "machine": {"processor": "x"}, "versions": {"torch": "2"}}
    runs = {
        "ours": [{"total": [99.0, 2.0, 9.0], "peak": 5.0}, {"total": [2.0], "peak": 7.0}],
        "other": [{"total": [4]}],
    }
    _, page = made(tmp_path, record | {"runs": runs})
    assert "| ours | 2 | 6 |" in page
    assert "| other | 4 |  |" in page
    several = {"a": record | {"runs": {"ours": [{"seed": 7, "speed": 2.5, "solved": None, "name": "x"}]}}}
    _, page = made(tmp_path, several)
    assert "## Whole programs: record, a" in page
    assert page.endswith("| | speed | solved |\n|---|---|---|\n| ours | 2.5 | (1 of 1 never) |\n")
    several["a"]["runs"]["ours"].append({"seed": 8, "speed": 2.5, "solved": 70, "name": "y"})
    assert made(tmp_path, several)[1].endswith("| ours | 2.5 | 70 (1 of 2 never) |\n")
    assert made(tmp_path, {"runs": runs} | {k: v for k, v in record.items() if k != "commit"})[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the PTX interpreter")
def test_launches_are_miscounted():
    """ppo_loss: two launches forward, one backward. A second call counts anew."""
    x, mask = torch.randn(6, 2, 5), torch.ones(2, 5, dtype=torch.bool)
    leaf = x[0].clone().requires_grad_()

    def run() -> None:
        ppo.ppo_loss(leaf, *x[1:], mask, backend="triton").loss.backward()

    for _ in range(2):
        with measure.counting_triton() as started:
            run()
        assert len(started) == 3, started
        run()
        assert len(started) == 3, "counts on behind its block"
    assert measure.launches(run, torch.device("cpu")) == 3
    assert measure.launches(lambda: ppo.gae(x[0], x[1], backend="torch"), torch.device("cpu")) == "-"


def test_a_missing_peer_is_skipped_without_its_name_or_leaves_stand_ins_behind():
    kept = list(sys.meta_path)
    for find in (peers.peer, peers.peer_without_its_cluster):
        with pytest.raises(pytest.skip.Exception, match="some-peer is not installed"):
            find("no_such_module", "some-peer")
    assert sys.meta_path == kept
    assert "vllm" not in sys.modules


def test_peak_memory_forgets_the_gradient_or_counts_what_was_there():
    leaf = torch.ones(1000, requires_grad=True)

    def run() -> None:
        leaf.grad = None  # as benchmarks do, so that each call makes the gradient anew
        doubled = leaf * 2
        doubled.sum().backward()

    run()
    cpu = torch.device("cpu")
    assert measure.peak_extra_bytes(run, cpu, [leaf]) >= 8000  # the product, and the leaf's gradient
    assert measure.peak_extra_bytes(lambda: leaf.detach(), cpu) == 0
