"""Dry runs of the benchmarks on a pretended GPU, with compiled kernels in the PTX interpreter; and the report, which
shows what a record holds, also where a baseline is better."""

import copy
import functools
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_learn
import choices
import first_minutes
import json_lines
import measure
import outcomes
import peers
import plots
import predict
import pytest
import report
import rows
import torch

import ppo_fast as ppo

ROOT = Path(__file__).parents[2]


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


DRY = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")


def dry_run(folder: Path, part: str) -> dict[str, Any]:
    """The record of a part on a pretended GPU."""
    done = on_gpu(folder, part, "0123abc", "dry")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    record = json_lines.read(folder / f"{part}.jsonl")
    assert record["commit_info"]["id"] == "0123abc"
    assert record["machine_info"]["versions"]["torch"]
    assert record["machine_info"]["gpu"]["name"]
    return record


@DRY
@pytest.mark.parametrize("part", ["rows", "advantages", "linear", pytest.param("learn", marks=pytest.mark.slow)])
def test_dry_run_of_each_benchmark_leaves_a_complete_record(tmp_path: Path, part: str):
    infos = [row["extra_info"] for row in dry_run(tmp_path, part)["benchmarks"]]
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


@DRY
@pytest.mark.slow
def test_dry_run_of_the_first_minutes_answers_every_question_in_order(tmp_path: Path):
    answers = [row["extra_info"] for row in dry_run(tmp_path, "first")["benchmarks"]]
    questions = list(dict.fromkeys(answer["question"] for answer in answers))
    assert [question.split()[0:4] for question in questions] == [
        ["what", "does", "this", "machine"],
        ["is", "the", "operation", "right?"],
        ["do", "two", "steps", "of"],
        ["is", "packed", "attention", "exact?"],
        ["is", "the", "kernel", "right"],
    ]
    steps = {(x["family"], x["dtype"]) for x in answers if x["question"] == questions[2]}
    assert steps == {(family, dtype) for family in ("llama", "gpt2") for dtype in ("float32", "bfloat16")}
    assert {x["function"] for x in answers if x["question"] == questions[3]} == set(first_minutes.libraries())
    assert all(x.get("passed", "machine" in x or "skipped" in x) is True for x in answers)


@pytest.mark.parametrize("heads", first_minutes.HEADS.values(), ids=first_minutes.HEADS)
@pytest.mark.parametrize("version", ["torch_2_11", "torch_2_12"])
def test_pytorchs_attention_is_called_directly_in_each_version(version, heads, monkeypatch):
    from support import flash_attn_stand_in as stand_in

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", getattr(stand_in, version))
    function = first_minutes.libraries()["PyTorch's varlen_attn"]
    assert callable(function)
    q, k, v = (
        torch.randn(1, n, sum(first_minutes.LENGTHS), first_minutes.HEAD_SIZE, dtype=torch.bfloat16)
        for n in (heads[0], heads[1], heads[1])
    )
    for window in (None, 5):
        exact = first_minutes.by_definition(q.double(), k.double(), v.double(), window)
        assert torch.allclose(function(q, k, v, window).double(), exact, atol=0.02)


def test_libraries_that_need_a_newer_gpu_are_skipped_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("ppo_fast.common.device.compute_capability", lambda device: (7, 5))
    monkeypatch.setattr(first_minutes, "compare_attention", lambda *_: {"passed": True})
    writer = json_lines.Writer(tmp_path / "record.jsonl", "0123abc")
    first_minutes.ask_attention(writer, torch.device("cpu"))
    rows = [row["extra_info"] for row in json_lines.read(tmp_path / "record.jsonl")["benchmarks"]]
    assert {row["function"] for row in rows if "skipped" in row} == set(first_minutes.libraries()) - {
        "the trainer's path"
    }
    assert {row["function"] for row in rows if "passed" in row} == {"the trainer's path"}


@DRY
def test_dry_run_of_the_choices_measures_each_alternative(tmp_path: Path):
    found = [row["extra_info"] for row in dry_run(tmp_path, "choices")["benchmarks"]]
    assert not [row for row in found if "error" in row or "skipped" in row]
    assert {row["choice"] for row in found} == {"cudnn", "grouped", "precision", "probe", "chunks"}

    def alternatives(choice: str, name: str) -> set[Any]:
        return {row[name] for row in found if row["choice"] == choice}

    assert alternatives("cudnn", "cudnn") == {"allowed", "not allowed"}
    assert alternatives("cudnn", "case") == {"learning", "sampling"}
    assert alternatives("grouped", "keys") == {"as they are", "repeated"}
    assert alternatives("precision", "float32_matmul_precision") == {"highest", "high"}
    assert alternatives("probe", "kind") == {"float32", "bfloat16 autocast", "bfloat16 weights"}
    assert alternatives("chunks", "chunk_bytes") == set(choices.TINY.chunks)
    noisy = [row for row in found if row["choice"] in ("probe", "precision")]
    assert all(0 <= row[f"share_of_bound_{name}"] < 1 for row in noisy for name in ("linear", "packed"))
    assert all(row["median_ms"] > 0 for row in found if row["choice"] in ("grouped", "chunks"))


@DRY
@pytest.mark.slow
def test_the_tests_part_runs_each_test_once_and_continues_what_was_cut_off(tmp_path: Path):
    for _ in range(2):
        done = on_gpu(tmp_path, "tests", "0123abc", "dry")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = (tmp_path / "tests.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["test"] for line in lines}) >= 4
    assert {json.loads(line)["outcome"] for line in lines} == {"passed"}


def test_every_part_of_the_script_has_a_dry_run():
    lines = (ROOT / "bench" / "on_gpu.sh").read_text().splitlines()
    names = [line.split()[1] for line in lines if line.startswith(("part ", "bench "))]
    assert names == ["first", "tests", "choices", "learn", "linear", "rows", "advantages"]
    assert names == next(line for line in lines if line.startswith("all | ")).rstrip(") ;").split(" | ")[1:]


def test_a_failing_part_is_kept_and_sets_the_exit_status(tmp_path: Path):
    done = on_gpu(tmp_path, "rows", "0123abc", "no such size")
    assert done.returncode != 0
    assert "no such size" in (tmp_path / "rows.log").read_text()


def test_a_folder_of_others_is_rejected(tmp_path: Path):
    (tmp_path / "rows.log").write_text("mine")
    for out in (tmp_path, tmp_path / "rows.log"):
        done = on_gpu(out, "rows", "0123abc", "dry")
        assert done.returncode == 2
        assert done.stderr == f"{out} holds files that this script did not write: choose a new or empty folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.log"]
    assert (tmp_path / "rows.log").read_text() == "mine"


def test_an_unknown_part_is_refused(tmp_path: Path):
    done = on_gpu(tmp_path, "everything")
    assert done.returncode == 2
    assert "the parts are first, tests, choices" in done.stderr


def test_gpu_selects_the_tests_with_a_device_and_those_that_need_one():
    """Collected without a GPU, where the latter are selected, too, and skipped when they run."""
    names = ("kernels/test_gae", "llm/test_packing", "llm/test_trainer_on_device", "llm/test_data")
    files = [f"tests/{name}.py" for name in names]
    found = {}
    for selection in ("gpu", "not gpu"):
        done = bench(*files, "--collect-only", "-m", selection)
        assert done.returncode == 0, done.stdout[-2000:]
        found[selection] = {line for line in done.stdout.splitlines() if "::" in line}
    assert "tests/kernels/test_gae.py::test_padded_rows_match_the_reference[triton-1]" in found["gpu"]
    assert any("test_two_steps" in name for name in found["gpu"])
    assert any("test_gpu_results_are_exact_and_repeat" in name for name in found["gpu"])
    assert {name.split("::")[0] for name in found["not gpu"]} == {"tests/llm/test_packing.py", "tests/llm/test_data.py"}
    assert not any(name.startswith("tests/llm/test_data.py") for name in found["gpu"])


# Records


def test_a_record_holds_failed_rows_and_rows_without_memory_or_time(tmp_path: Path, capsys):
    def no_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def broken() -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    writer = json_lines.Writer(tmp_path / "x.jsonl", "0123abc", budget=1e9)
    writer.measure({"row": 1}, lambda: {"passed": True})
    writer.measure({"row": 2}, no_memory)
    writer.measure({"row": 3}, broken)
    writer.measure({"row": 4}, lambda: {"passed": False})
    writer.budget = 0
    writer.measure({"row": 5}, lambda: {"passed": True})
    found = {row["extra_info"].pop("row"): row["extra_info"] for row in json_lines.read(writer.path)["benchmarks"]}
    assert found[1].pop("seconds") >= 0
    assert found[1] == {"passed": True}
    assert found[2]["out_of_memory"] == "CUDA out of memory."
    assert found[3]["error"] == "RuntimeError: no kernel image"
    assert found[5] == {"skipped": "the budget of 0 s is spent"}
    assert writer.failed == 2
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_record_that_was_cut_off_keeps_its_complete_lines(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    writer = json_lines.Writer(path, "0123abc")
    writer.add({"a": 1})
    writer.add({"a": 2})
    path.write_text(path.read_text()[:-3])
    assert json_lines.read(path)["benchmarks"] == [{"extra_info": {"a": 1}}]
    path.write_text(path.read_text() + "\n{}\n")
    with pytest.raises(json.JSONDecodeError):
        json_lines.read(path)


def test_a_slow_call_on_a_gpu_has_at_least_five_samples(monkeypatch: pytest.MonkeyPatch):
    def do_bench(run, warmup, rep, return_mode):
        estimate_ms = 24.0  # above the 20 ms of a call, as at a lower clock
        return [20.0] * max(1, int(rep / estimate_ms))

    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call = functools.partial(time.sleep, 0.02)
    assert len(measure.samples_ms(call, torch.device("cuda"), seconds=0.01)) >= 5


def test_a_measurement_on_a_gpu_is_found_in_json_lines(tmp_path: Path):
    task = next(task for task in predict.tasks() if task.operation == "gae")
    info = {"operation": "gae", "shape": task.shape, "provider": "ppo_fast", "samples_ms": [9.0], "replay_ms": [0.011]}
    (tmp_path / "h200").mkdir()
    lines = [{"machine_info": {"gpu": {"name": "NVIDIA H200"}}}, info]
    (tmp_path / "h200" / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert predict.measured_ms(tmp_path) == {("H200", "gae", task.shape): 0.011}


@pytest.mark.parametrize(
    ("gib", "kept"),
    [
        (23, {(1024, "ppo_fast"), (1024, bench_learn.EAGER)}),
        (79, {(1024, "ppo_fast"), (1024, bench_learn.EAGER), (2048, "ppo_fast")}),
        (139, {(width, name) for width in (1024, 2048) for name in ("ppo_fast", bench_learn.EAGER)}),
    ],
)
def test_each_gpu_measures_the_learn_steps_that_fit_it(gib: int, kept: set[tuple[int, str]]):
    """GPUs of 24, 80 and 141 GB, with what PyTorch itself takes off."""
    shapes = bench_learn.SHAPES["cuda", "default"]
    names = ("ppo_fast", bench_learn.EAGER)
    reasons = {(s[1], name): bench_learn.why_not(s, name, gib * 2**30) for s in shapes for name in names}
    assert {key for key, reason in reasons.items() if reason is None} == kept
    assert all(f"and {gib:.1f} GiB are free" in reason for reason in reasons.values() if reason is not None)


def test_the_memory_of_the_eager_step_is_that_of_its_comment():
    """About 95 GiB, as bench_learn.SHAPES says of Llama-3.2-1B."""
    assert 85 < bench_learn.needed_bytes(bench_learn.SHAPES["cuda", "default"][1], bench_learn.EAGER) / 2**30 < 105


THREE_TESTS = """
import pathlib, pytest

def test_a():
    pass

def test_b():
    assert pathlib.Path({flag!r}).exists(), "no flag"

@pytest.mark.skip(reason="no third one")
def test_c():
    pass
"""


def with_outcomes(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**outside_xdist(), "PYTHONPATH": str(ROOT / "bench")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "outcomes"]
    command += ["--outcomes", str(folder / "o.jsonl"), "test_three.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_outcomes_are_written_at_once_and_only_what_is_left_runs_again(tmp_path: Path):
    flag = tmp_path / "flag"
    (tmp_path / "test_three.py").write_text(THREE_TESTS.format(flag=str(flag)))

    def known() -> dict[str, str]:
        return {name.split("::")[1]: outcome for name, outcome in outcomes.known(tmp_path / "o.jsonl").items()}

    assert with_outcomes(tmp_path, "--seconds", "0").returncode == 0
    assert set(known().values()) == {"left"}
    assert with_outcomes(tmp_path).returncode == 1
    assert known() == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert "no flag" in (tmp_path / "o.jsonl").read_text()
    flag.touch()
    assert "1 passed, 2 deselected" in with_outcomes(tmp_path).stdout
    assert with_outcomes(tmp_path).returncode == 0
    assert known() == {"test_a": "passed", "test_b": "passed", "test_c": "skipped"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in outside_xdist().items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def gae_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "gae.jsonl"
    done = bench("bench/bench_gae.py", "--size", "tiny", "--commit", "0123abc", "--record", str(path))
    assert done.returncode == 0, done.stdout[-2000:]
    return json_lines.read(path)


def test_pytest_benchmark_writes_the_same_rows(tmp_path: Path, gae_record: dict[str, Any]):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (the extra ppo_fast[bench])")
    path = tmp_path / "gae.json"
    done = bench("bench/bench_gae.py", "--size", "tiny", "--commit", "0123abc", "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout[-2000:]
    record = json.loads(path.read_text())
    assert record["commit_info"]["id"] == gae_record["commit_info"]["id"] == "0123abc"
    names = [
        [(r["extra_info"]["provider"], sorted(r["extra_info"])) for r in x["benchmarks"]] for x in (record, gae_record)
    ]
    assert names[0] == names[1]
    assert made(tmp_path, record)[0] == 0


def test_rows_beyond_the_budget_are_left_out_and_the_record_is_kept(tmp_path: Path):
    path = tmp_path / "gae.jsonl"
    done = bench(
        "bench/bench_gae.py", "--size", "tiny", "--commit", "0123abc", "--budget", "0", "--record", str(path), "-rs"
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "the budget of 0 s is spent" in done.stdout
    assert json_lines.read(path)["benchmarks"] == []


def made(folder: Path, record: dict[str, Any]) -> tuple[int, str]:
    """Exit status of the report maker and the page, or nothing."""
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install "ppo_fast[bench]"')
    (folder / "record.json").write_text(json.dumps(record))
    status = report.main([str(folder / "record.json"), "--out", str(folder / "report")])
    return status, (folder / "report" / "README.md").read_text() if status == 0 else ""


def test_the_report_has_every_row_and_its_source(tmp_path: Path, gae_record: dict[str, Any]):
    status, page = made(tmp_path, gae_record)
    assert status == 0
    found = [row["extra_info"] for row in gae_record["benchmarks"]]
    assert page.count("| ppo_fast |") == len({(x["operation"], x["shape"], x["dtype"]) for x in found})
    names = [info["provider"] for info in found]
    for name in set(names):
        assert page.count(f"| {name} |") == names.count(name)
    assert "commit 0123abc" in page
    assert f"torch {version('torch')}" in page
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "report").glob("*.png"))
    assert len(list((tmp_path / "report").glob("*.png"))) == len({info["operation"] for info in found})


def test_the_report_names_its_folder_and_links_the_records(tmp_path: Path, gae_record, capsys):
    _, page = made(tmp_path, gae_record)
    assert capsys.readouterr().out == f"README.md and its pictures are in {tmp_path / 'report'}\n"
    assert "[record.json](../record.json)" in page
    assert made(tmp_path, gae_record)[1] == page, "an earlier report is replaced"


def test_the_report_overwrites_no_files_of_others(tmp_path: Path, gae_record, capsys, monkeypatch):
    """As in the root of the clone: its README.md stays, and so does a folder or a file that --out names."""
    pytest.importorskip("matplotlib", reason='matplotlib is not installed: pip install "ppo_fast[bench]"')
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# My project")
    Path("record.json").write_text(json.dumps(gae_record))
    assert report.main(["record.json", "--out", "."]) == 1
    assert "holds files that ppo_fast did not write, such as README.md" in capsys.readouterr().err
    assert report.main(["record.json", "--out", "README.md"]) == 1
    assert "README.md is a file, and the results need a folder" in capsys.readouterr().err
    assert report.main(["record.json"]) == 0
    assert capsys.readouterr().out == "README.md and its pictures are in runs/report\n"
    assert Path("README.md").read_text() == "# My project"
    assert sorted(path.name for path in Path().iterdir()) == ["README.md", "record.json", "runs"]


@pytest.mark.parametrize("text", ['{"data": 1}\n', '{"commit": "mine"}\n', "# Notes\n"])
def test_a_record_replaces_only_a_record(tmp_path: Path, text: str):
    path = tmp_path / "x.jsonl"
    json_lines.Writer(path, "0123abc")
    json_lines.Writer(path, "4567def")
    assert json_lines.read(path)["commit_info"]["id"] == "4567def"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"x.jsonl is no record of these benchmarks and would be overwritten"):
        json_lines.Writer(path, "0123abc")
    done = bench("bench/bench_gae.py", "--size", "tiny", "--record", str(path))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is no record of these benchmarks and would be overwritten: choose another name" in done.stderr
    assert path.read_text() == text


def test_no_ceiling_is_below_the_floor(tmp_path: Path, gae_record):
    """A ceiling is a part of the task, so the task cannot be faster than it: its time is a floor, too."""
    found = [synthetic(name, n, ms, 1) for n in (1, 2, 4) for name, ms in (("ppo_fast", 2.0), ("three GEMMs", 0.25))]
    _, page = made(tmp_path, gae_record | {"benchmarks": [{"extra_info": info} for info in found]})
    assert "Floor 250 us: " in page
    assert "or the time of a ceiling, which is less" in page
    assert page.count("| 12.5 % |") == 3
    assert rows.floor_ms(found[:2]) == 0.25
    assert rows.floor_ms(found[:1]) == 0.5


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
def test_the_report_rejects_a_record_without_its_source(tmp_path, capsys, gae_record, place, value, said):
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


def test_cells_where_ours_is_behind_are_listed(tmp_path: Path, gae_record: dict[str, Any]):
    """A baseline is faster at N=1, needs less memory at N=2, ours is better without x at N=4; a ceiling is none."""
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
    assert (tmp_path / "report" / "x-against-N.png").stat().st_size > 1000


def test_each_width_of_a_sweep_has_a_picture():
    found = [synthetic("ppo_fast", n, 1.0, 1.0) for n in (1, 2, 4)]
    assert [(axis, fixed) for axis, fixed, _ in plots.sweeps(rows.groups_of(found)["x"])] == [("N", {"V": 8})]
    found[2]["shape"] = "N=4 V=16"
    assert not list(plots.sweeps(rows.groups_of(found)["x"]))


def test_the_record_of_a_whole_program_keeps_its_medians(tmp_path: Path):
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
def test_launches_are_counted():
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


def test_a_missing_peer_is_named_and_leaves_no_stand_ins():
    kept = list(sys.meta_path)
    for find in (peers.peer, peers.peer_without_its_cluster):
        with pytest.raises(pytest.skip.Exception, match="some-peer is not installed"):
            find("no_such_module", "some-peer")
    assert sys.meta_path == kept
    assert "vllm" not in sys.modules


def test_peak_memory_includes_gradients_and_no_earlier_tensors():
    leaf = torch.ones(1000, requires_grad=True)

    def run() -> None:
        leaf.grad = None  # as benchmarks do, so that each call makes the gradient anew
        doubled = leaf * 2
        doubled.sum().backward()

    run()
    cpu = torch.device("cpu")
    assert measure.peak_extra_bytes(run, cpu, [leaf]) >= 8000  # the product, and the leaf's gradient
    assert measure.peak_extra_bytes(lambda: leaf.detach(), cpu) == 0
