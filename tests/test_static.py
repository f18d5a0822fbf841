"""The ahead-of-time gate (bench/static.py), and what Triton compiles."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import predict
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")

import static
from ptx.emulator import Emulator, compile_launch

from ppo_fast.kernels import logprobs

ROOT = Path(__file__).parent.parent
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
        logprobs.token_logprobs(logits, torch.zeros(4, dtype=torch.int64)).sum().backward()

    return captured(make)


def test_the_gate_reports_spills_narrow_loads_and_barriers():
    """64 rows of a strided layout to a program of 64 threads spill, and their loads are not 16 bytes wide."""
    launch = next(launch for launch in backward_of_rows(63, offset=1) if "bwd" in launch.kernel.__name__)
    bad = launch._replace(constexprs=tuple(sorted((dict(launch.constexprs) | {"ROWS": 64}).items())))
    compiled = compile_launch(bad, static.TARGETS["sm_90"])
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
            out = logprobs.token_logprobs(logits, tokens, mask, temperature=temperature, with_entropy=True)
            torch.autograd.grad(out[0].sum() + out[1].sum(), logits)

    for V in (32, 1000, 8000):
        launches = captured(lambda V=V: make(V))
        assert len(launches) == len({launch.kernel for launch in launches}) == 2, launches


def test_row_offsets_are_multiplied_in_64_bits():
    """fla #1080, mamba #1015, triton #832: silent corruption past 2^31 elements. Proven on the IR of every layout."""
    launches = {launch for offset in (0, 1) for V in (4100, 8192) for launch in backward_of_rows(V, offset=offset)}
    assert len(launches) >= 4
    for launch in launches:
        ttir = compile_launch(launch, static.TARGETS["sm_90"]).asm["ttir"]
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
    assert static.cuda_loop(SASS) == (0x40, 0x70)
    assert static.cuda_loop("") == (0, 0)
    assert len(static.amd_loop(AMD)) == 3


def test_a_prediction_has_its_measurement_beside_it(tmp_path: Path):
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
