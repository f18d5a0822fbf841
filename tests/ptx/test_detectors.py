"""Each detector of the PTX interpreter, on a few lines of PTX with one fault and without it."""

import re

import numpy as np
import pytest
from ptx.arithmetic import Approximations
from ptx.machine import Issue, Kernel, Machine
from ptx.memory import Segment
from ptx.program import UnknownPTX
from ptx.translate import POISON

THREADS = 64
PREAMBLE = """
    .loc 1 7 3 // kernel.py:7:3
    mov.u32 %r90, %tid.x;
    mov.u32 %r91, %ctaid.x;
    ld.param.b64 %rd90, [k_param_0];
    ld.param.b64 %rd91, [k_param_1];
    mad.wide.u32 %rd92, %r90, 4, %rd90;
    mad.wide.u32 %rd93, %r90, 4, %rd91;
    mul.lo.s32 %r92, %r90, 4;
"""


def run(
    body: str,
    *,
    elements: int = THREADS,
    programs: int = 1,
    seed: int = 0,
    unwritten: bool = False,
    element: int = 4,
) -> list[Issue]:
    """Issues of a kernel of 64 threads that reads `elements` numbers at %rd90 and writes at %rd91.

    element: bytes of the elements of the tensors that own this memory.
    """
    entry = f".visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1) .reqntid {THREADS} {{"
    data = np.full(elements, POISON, np.uint32) if unwritten else np.arange(elements, dtype=np.uint32)
    out = np.full(elements, POISON, np.uint32)
    memory = [
        Segment(1 << 20, data.view(np.uint8), "data", element),
        Segment(1 << 30, out.view(np.uint8), "out", element),
    ]
    machine = Machine(Kernel("\n".join([entry, PREAMBLE, body, "ret;", "}"])), memory, 4 * THREADS)
    parameters = {"k_param_0": np.uint64(1 << 20), "k_param_1": np.uint64(1 << 30)}
    machine.run(parameters, (programs, 1, 1), Approximations(), seed)
    return list(machine.issues)


def only(issues: list[Issue], message: str) -> Issue:
    """The single issue; its message must match."""
    assert len(issues) == 1, issues
    assert re.search(message, issues[0].message), issues[0]
    return issues[0]


LOAD, STORE = "ld.global.b32 %r1, [%rd92];", "st.global.b32 [%rd93], %r1;"
EXCHANGE = """
    st.shared.b32 [%r92], %r1;
    {barrier}
    xor.b32 %r2, %r92, 128;
    ld.shared.b32 %r1, [%r2];
"""


def test_a_right_kernel_has_no_issue():
    assert run(f"{LOAD}\n{EXCHANGE.format(barrier='bar.sync 0;')}\n{STORE}") == []


def test_an_issue_names_kernel_instruction_and_source_line():
    issue = only(run(LOAD, elements=THREADS - 1), "load out of bounds by 4 bytes")
    assert issue.kernel == "k"
    assert issue.instruction == "ld.global.b32 %r1, [%rd92]"
    assert issue.source == "kernel.py:7:3"
    assert str(issue).startswith("k: load out of bounds")


def test_a_race_in_shared_memory_without_a_barrier_is_reported():
    issue = only(run(f"{LOAD}\n{EXCHANGE.format(barrier='')}\n{STORE}"), "shared memory .* without a barrier")
    assert issue.instruction.startswith("ld.shared")


def test_a_write_after_a_read_of_another_warp_needs_a_barrier():
    again = "st.shared.b32 [%r92], %r1;"
    body = f"{LOAD}\n{EXCHANGE.format(barrier='bar.sync 0;')}\n"
    only(run(f"{body}{again}\n{STORE}"), "a warp writes shared memory that another warp reads")
    assert run(f"{body}bar.sync 0;\n{again}\n{STORE}") == []


def test_lanes_of_a_warp_need_no_barrier():
    body = EXCHANGE.format(barrier="").replace("128", "4")
    assert run(f"{LOAD}\n{body}\n{STORE}") == []


def test_a_race_of_warps_in_global_memory_is_reported():
    swap = "xor.b32 %r2, %r90, 32;\nmad.wide.u32 %rd94, %r2, 4, %rd91;\nld.global.b32 %r3, [%rd94];"
    issue = only(run(f"{LOAD}\n{STORE}\n{swap}"), "bytes of out that another warp reads, without a barrier")
    assert issue.instruction.startswith("ld.global.b32 %r3")
    assert run(f"{LOAD}\n{STORE}\nbar.sync 0;\n{swap}") == []


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_two_programs_write_are_reported(seed):
    only(run(f"{LOAD}\n{STORE}", programs=2, seed=seed), "a program writes bytes of out that another program writes")


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_one_program_writes_and_another_reads_are_reported(seed):
    """Program 0 writes, program 1 reads; in either order."""
    body = f"""
    {LOAD}
    setp.eq.s32 %p1, %r91, 0;
    @%p1 st.global.b32 [%rd93], %r1;
    @!%p1 ld.global.b32 %r2, [%rd93];
    """
    issues = [i for i in run(body, programs=2, seed=seed) if "never been written" not in i.message]
    only(issues, "a program writes bytes of out that another program reads")


def test_programs_may_read_the_same_bytes():
    assert run(LOAD, programs=3) == []


def test_a_store_out_of_bounds_is_reported():
    only(run("st.global.b32 [%rd93 + 4], %r90;"), "store out of bounds by 4 bytes")


def test_an_address_at_the_end_of_the_address_space_is_out_of_bounds():
    body = "mov.b64 %rd1, -4;\nsetp.lt.u32 %p1, %r90, 1;\nselp.b64 %rd2, %rd1, %rd92, %p1;"
    only(run(f"{body}\nld.global.b32 %r1, [%rd2];"), "load out of bounds")


def test_shared_memory_has_bounds():
    only(run("st.shared.b32 [%r92 + 4], %r90;"), "store out of bounds of shared memory")


def test_a_misaligned_access_is_reported():
    only(run("ld.global.v2.b32 {%r1, %r2}, [%rd92];"), "misaligned access of 8 bytes")
    only(run("add.s32 %r1, %r92, 2;\nst.shared.b32 [%r1 + -2], %r90;\nld.shared.b32 %r2, [%r1];"), "misaligned|out of")


def test_bytes_that_were_never_written_are_reported():
    only(run(LOAD, unwritten=True), "bytes of data that have never been written")
    only(run("ld.shared.b32 %r1, [%r92];"), "shared memory that was never written")


@pytest.mark.parametrize("width", [8, 16])
def test_unwritten_halves_and_bytes_are_reported(width):
    only(run(f"ld.global.b{width} %rs1, [%rd92];", unwritten=True), "bytes of data that have never been written")


def test_one_unwritten_half_of_a_word_is_reported_in_a_tensor_of_halves():
    """Written by a store of 16 bits to every second half, then loaded as whole words."""
    body = "cvt.u16.u32 %rs1, %r90;\nst.global.b16 [%rd93], %rs1;\nld.global.b32 %r1, [%rd93];"
    only(run(body, element=2), "bytes of out that have never been written")
    assert run(f"{body.replace('ld.', 'st.global.b16 [%rd93 + 2], %rs1;ld.')}", element=2) == []


def test_an_unwritten_half_is_reported_when_it_is_stored_in_a_word():
    body = """
    setp.lt.u32 %p1, %r90, 5;
    mov.b16 %rs2, 1;
    @%p1 mov.b16 %rs1, 3;
    mov.b32 %r1, {%rs2, %rs1};
    st.global.b32 [%rd93], %r1;
    """
    only(run(body, element=2), "store of a register that was never written")


def test_a_byte_that_looks_like_poison_by_chance_is_not_reported():
    assert run("ld.global.b8 %rs1, [%rd92];", elements=256) == []  # 0xBA is among the numbers


def test_a_register_that_was_never_written_is_reported():
    issue = only(run("add.s32 %r1, %r7, 1;"), r"register %r7 is read before it is written")
    assert issue.instruction == "add.s32 %r1, %r7, 1"


def test_an_undefined_half_of_a_pair_is_reported_only_if_it_is_stored():
    """sm_100 adds single numbers as a half of a pair. The other half may be a register that no instruction writes."""
    body = """
    ld.global.b32 %r1, [%rd92];
    mov.b64 %rd1, {%r1, %r7};
    add.rn.f32x2 %rd2, %rd1, %rd1;
    mov.b64 {%r2, _}, %rd2;
    st.global.b32 [%rd93], %r2;
    """
    assert run(body) == []
    stored = "mov.b64 {_, %r2}, %rd1;\nst.global.b32 [%rd93], %r2;"
    only(run(body.partition("add")[0] + stored), "store of a register that was never written")


def test_a_register_written_by_some_threads_is_reported_when_all_store_it():
    body = "setp.lt.u32 %p1, %r90, 5;\n@%p1 mov.u32 %r1, 3;\nst.global.b32 [%rd93], %r1;"
    only(run(body), "store of a register that was never written")
    assert run(body.replace("st.global", "@%p1 st.global")) == []


def test_a_divergent_branch_is_reported():
    issue = only(run("setp.lt.u32 %p1, %r90, 5;\n@%p1 bra $L_1;\n$L_1:"), "divergent branch, taken by 5 of 64 threads")
    assert issue.instruction == "@%p1 bra $L_1"
    assert run("setp.lt.u32 %p1, %r90, 500;\n@%p1 bra $L_1;\n$L_1:") == []


def test_a_divergent_barrier_is_reported():
    only(run("setp.lt.u32 %p1, %r90, 32;\n@%p1 bar.sync 0;"), "divergent barrier, reached by 32 of 64 threads")


@pytest.mark.parametrize("barrier", ["bar.sync 1, 32;", "bar.sync 1;", "bar.sync %r90;"])
def test_a_barrier_of_a_part_of_the_block_is_an_error(barrier):
    with pytest.raises(UnknownPTX, match="a barrier of a part of the threads"):
        run(barrier)


@pytest.mark.parametrize(
    "line", ["shfl.sync.bfly.b32 %r1, %r90, 16, 31, 65535;", "redux.sync.add.s32 %r1, %r90, %r92;"]
)
def test_an_exchange_between_a_part_of_the_lanes_is_reported(line):
    only(run(line), "a part of a warp's lanes")


def test_a_row_of_a_matrix_must_be_aligned():
    body = "mul.lo.s32 %r1, %r90, 4;\nst.shared.b32 [%r1], %r90;\nbar.sync 0;\nand.b32 %r2, %r90, 7;"
    load = "\nmul.lo.s32 %r3, %r2, {};\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r4}}, [%r3];"
    assert run(body + load.format(16)) == []
    only(run(body + load.format(8)), "misaligned row of a matrix")


def test_an_endless_loop_is_reported(monkeypatch):
    monkeypatch.setattr("ptx.machine.MAX_BRANCHES", 100)
    only(run("$L_1:\nbra.uni $L_2;\n$L_2:\nsetp.lt.u32 %p1, %r90, 500;\n@%p1 bra $L_1;"), "endless loop")
    only(run("$L_1:\nadd.s32 %r1, %r90, 1;\nbra.uni $L_1;"), "endless loop")


def test_different_values_at_one_address_are_reported():
    body = "ld.param.b64 %rd1, [k_param_1];\nst.global.b32 [%rd1], {};"
    only(run(body.format("%r90")), "threads store different values to one address")
    assert run(body.format("%r91")) == []


def test_a_product_of_registers_that_changed_since_is_not_fused():
    body = "mov.b32 %r2, 0f3F800000;\nmul.f32 %r1, %r2, %r2;\nmov.b32 %r2, 0f40000000;\nadd.f32 %r3, %r1, %r2;"
    entry = f".visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1) .reqntid {THREADS} {{"
    assert Kernel("\n".join([entry, body, "ret;", "}"])).translation.contractions == 0


def test_mul_and_add_without_rounding_run_fused_and_unfused():
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, which a rounded product loses. With .rn nothing may be fused."""
    body = """
    mul.f32 %r1, %r2, %r2;
    sub.f32 %r3, %r1, %r4;
    st.global.b32 [%rd93], %r3;
    """
    numbers = "mov.b32 %r2, 0f3F800800;\nmov.b32 %r4, 0f3F801000;\n"
    entry = f".visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1) .reqntid {THREADS} {{"
    results = {}
    for rounding in ("", ".rn"):
        text = body.replace("mul.f32", f"mul{rounding}.f32").replace("sub.f32", f"sub{rounding}.f32")
        for contract in (False, True):
            kernel = Kernel("\n".join([entry, PREAMBLE, numbers, text, "ret;", "}"]), contract=contract)
            out = np.zeros(THREADS, np.float32)
            machine = Machine(kernel, [Segment(1 << 30, out.view(np.uint8), "out")], 0)
            machine.run(
                {"k_param_0": np.uint64(0), "k_param_1": np.uint64(1 << 30)}, (1, 1, 1), Approximations(), seed=0
            )
            results[rounding, contract] = float(out[0])
            assert kernel.translation.contractions == (rounding == "")
    assert results == {("", False): 0.0, ("", True): 2.0**-24, (".rn", False): 0.0, (".rn", True): 0.0}
