"""The ahead-of-time gate (bench/static.py), and what Triton compiles."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import loops
import predict
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")

import static
from ptx.emulator import Emulator
from support.backends import TRITON

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in static.TARGETS if name != "sm_90"]


def gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/static.py", "--quiet", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--arch", "sm_90"], id="sm_90", marks=pytest.mark.slow),
        pytest.param(["--arch", *OTHERS, "--every", "16"], id="a sample of others", marks=pytest.mark.slow),
    ],
)
def test_variants_compile_without_spills_and_with_wide_loads(arguments):
    """All variants for the architecture of CI; `python bench/static.py` compiles all for all."""
    done = gate(*arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_gate_rejects_an_interpreted_run():
    done = gate(TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def captured(make) -> list:
    """The launches of a call, which is not run."""
    emulator = Emulator()
    emulator.runs = False
    with emulator.installed():
        make()
    return list(emulator.launches)


def backward_of_rows(V: int, *, offset: int = 0) -> list:
    def make() -> None:
        logits = torch.zeros(4, V + offset, dtype=torch.float32)[:, offset:].requires_grad_()
        TRITON.token_logprobs(logits, torch.zeros(4, dtype=torch.int64)).sum().backward()

    return captured(make)


def test_the_gate_reports_spills_narrow_loads_and_barriers():
    """64 rows of a strided layout to a program of 64 threads spill, and their loads are not 16 bytes wide."""
    launch = next(launch for launch in backward_of_rows(63, offset=1) if "bwd" in launch.kernel.__name__)
    bad = launch._replace(constexprs=tuple(sorted((dict(launch.constexprs) | {"ROWS": 64}).items())))
    compiled = static.compile_variant(bad, static.TARGETS["sm_90"])
    report = static.cuda_report(compiled.asm["cubin"], compiled.metadata.shared, disassemble=True)
    spills, narrow = static.problems("aligned", "sm_90", report)
    assert spills.startswith("spills")
    assert narrow == "has no load of 128 bits"
    assert static.problems("unaligned", "sm_90", report._replace(spills=0)) == []
    assert static.problems("gae columns", "sm_90", report._replace(spills=0, barriers=1)) == [
        "has a barrier in its loop"
    ]


def test_other_batches_lengths_and_temperatures_compile_nothing_new():
    """Liger #146, fla #669: 64 combinations of B, T and temperature, 1, 16 and 17 among them, have one variant."""

    def make(V: int) -> None:
        for B, T, temperature in itertools.product((1, 2, 16, 17), (1, 16, 17, 33), (1, 16, 17, 0.7)):
            base = torch.zeros(B, T + 2, V, dtype=torch.bfloat16, requires_grad=True)
            logits = base[:, 1:-1] if T % 2 else base[:, 1:-1].contiguous()
            tokens = torch.zeros(B, T + 1, dtype=torch.int64)[:, 1:]
            mask = None if temperature == 17 else torch.ones(B, T, dtype=torch.bool)
            out = TRITON.token_logprobs(logits, tokens, mask, temperature=temperature, with_entropy=True)
            torch.autograd.grad(out[0].sum() + out[1].sum(), logits)

    for V in (32, 1000, 8000):
        launches = captured(lambda V=V: make(V))
        assert len(launches) == len({launch.kernel for launch in launches}) == 2, launches


def test_row_offsets_are_multiplied_in_64_bits():
    """fla #1080, mamba #1015, triton #832: silent corruption past 2^31 elements. Proven on the IR of every layout."""
    launches = {launch for offset in (0, 1) for V in (4100, 8192) for launch in backward_of_rows(V, offset=offset)}
    assert len(launches) >= 4
    for launch in launches:
        ttir = static.compile_variant(launch, static.TARGETS["sm_90"]).asm["ttir"]
        products = re.findall(r"arith\.muli .*%\w+_stride_\w+.*|arith\.muli %\w+, %\w+stride.*", ttir)
        strides = set(re.findall(r"%(\w+_stride_\w+): (\w+)", ttir))
        assert len(strides) >= 7
        assert {kind for _, kind in strides} == {"i64"}
        assert len(products) >= 6  # b and t of logits, tokens and mask
        for product in products:
            assert product.split(" loc(")[0].rstrip().endswith(("i64", "i64>")), product


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P3 BRA 0x10 ;
        /*0030*/                   BRA.U !UP3, 0x0 ;
        /*0040*/                   MOV R3, R4 ;
        /*0050*/                   LDG.E.128 R4, [R2] ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   BRA 0x40 ;
        /*0080*/                   EXIT ;
        /*0090*/                   MOV R7, R8 ;
        /*00a0*/                   BRA 0x60 ;
        /*00b0*/                   BRA 0xb0;
"""
AMD = """
.LBB0_0:
\tv_add_f32 v0, v0, v1
.LBB0_1:                               ;   in Loop: Header=BB0_2 Depth=1
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:                               ; =>This Inner Loop Header: Depth=1
\tv_add_f32 v0, v0, v1
\t.loc 1 2 3
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
"""


def test_innermost_loops_are_found_and_rare_cases_behind_the_end_are_none():
    """In SASS loops of two (inside one of four) and four instructions; the jump from 0xa0 leaps over an EXIT."""
    assert [loop.instructions for loop in loops.cuda_loops(SASS)[1]] == [2, 4]
    assert static.longest(loops.cuda_loops("")[1]) == loops.Loop()
    assert [loop.instructions for loop in loops.amd_loops(AMD)[1]] == [1]


def test_a_prediction_appears_with_its_measurement(tmp_path: Path):
    """A record of our rows on an H200 appears in the table; a baseline's row and a CPU's record do not."""
    task = next(task for task in predict.tasks() if task.operation == "gae")
    info = {"operation": "gae", "shape": task.shape, "provider": "ppo_fast", "samples_ms": [9.0], "replay_ms": [0.011]}
    other = {"extra_info": info | {"provider": "torchrl", "replay_ms": [0.5]}}
    gpu = {"machine_info": {"gpu": {"name": "NVIDIA H200"}}, "benchmarks": [{"extra_info": info}, other]}
    for name, record in (("h200", gpu), ("cpu", {**gpu, "machine_info": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    lines = [line for line in predict.page(tmp_path) if line.startswith("| ")]
    assert [line for line in lines if "11 us (H200)" in line] == [
        line for line in lines if f"gae | {task.shape}" in line
    ]
    assert sum("not yet measured" in line for line in lines) == len(lines) - 2  # the measured one and the head
    (tmp_path / "h200" / "record.json").unlink()
    assert "H200)" not in "\n".join(predict.page(tmp_path))


def test_predicted_times_match_the_hand_calculation():
    """Worked by hand: 3 x 2 N D V = 25.8 TFLOP at 788 TFLOP/s is 32.8 ms, 10 N V bytes at 4.3 TB/s 2.4 ms."""
    h200 = next(machine for machine in predict.MACHINES if machine.name == "H200")
    task = next(
        t for t in predict.tasks() if t.shape == "N=8192 D=4096 V=128256" and t.operation.startswith("linear_ppo")
    )
    assert predict.predicted_ms(task, h200) == pytest.approx(32.77 + 2.44 + 0.036, abs=0.02)


def test_instructions_of_inner_loops_are_counted():
    """SASS above: loops of two (0x10 to 0x20, inside another) and four instructions, one of which loads. AMD: the loop
    has one vector instruction, since scalar ones are issued beside it."""
    whole, inner = loops.cuda_loops(SASS.replace("FADD R4", "MUFU.EX2 R4"))
    assert whole == loops.Loop(8, 1, 1)  # branches that only the padding has, too, are left out
    assert inner == [loops.Loop(2), loops.Loop(4, 1, 1)]
    body = "\tv_add_f32 v0, v0, v1\n\tv_exp_f32_e32 v1, v0\n\tglobal_store_dword v[0:1], v1, off"
    whole, inner = loops.amd_loops(AMD.replace("\t.loc 1 2 3", body))
    assert whole == loops.Loop(5, 1, 0, 1)
    assert inner == [loops.Loop(4, 1, 0, 1)]


def test_a_loops_instructions_are_shared_by_the_elements_of_its_tile():
    """40 instructions for 4 elements of a thread are 10 for one; two branches of which one runs, 5."""
    whole, inner = loops.Loop(100), [loops.Loop(30, 2, 4, 0), loops.Loop(40, 4, 4, 2)]
    costs = {
        (kind, branches): predict.cost_of(predict.Kernel("", kind, branches), whole, inner, 4)
        for kind, branches in (("store", 1), ("store", 2), ("all", 1), ("last", 1), ("none", 1))
    }
    assert costs == {
        ("store", 1): (10, 1),
        ("store", 2): (5, 0.5),
        ("all", 1): (17.5, 1.5),
        ("last", 1): (10, 1),
        ("none", 1): (25, 0),
    }


def test_the_busiest_resource_limits_a_kernel():
    """Worked by hand for 1e9 elements of 2 bytes on an H200: 0.465 ms of memory at 4.3 TB/s; 10 instructions each are
    1e10 / (132 * 128 * 1.83e9 per s) = 0.323 ms of issue slots; one special function 1e9 / (132 * 16 * 1.83e9 per s) =
    0.259 ms."""
    h200 = next(machine for machine in predict.MACHINES if machine.name == "H200")
    task = predict.Task("", "", 10**9, "", (predict.Part("kernel", 2),))
    expected = {(10, 1): ("memory", 0.465), (20, 1): ("issue slots", 0.647), (10, 3): ("MUFU", 0.776)}
    for cost, (limit, ms) in expected.items():
        costs = {"kernel": {"sm_90": predict.Cost(*cost)}}
        spent = predict.spent_ms(task, h200, costs)
        assert spent[limit] == pytest.approx(ms, abs=0.001)
        assert predict.predicted_ms(task, h200, costs) == pytest.approx(ms + 0.003, abs=0.001)  # and a launch
        assert predict.cell(task, h200, costs).endswith(f", {limit}")
    small = predict.Task("", "", 1, "", (predict.Part("kernel", 2, round_trips=10),))
    assert predict.cell(small, h200, {}) == "10 us, latency"  # 10 x 0.7 us, and a launch of 3 us


def test_every_predicted_kernel_is_a_variant():
    for threads_per_warp in (32, 64):
        assert {kernel.variant for kernel in predict.KERNELS.values()} <= set(static.listed(threads_per_warp))
