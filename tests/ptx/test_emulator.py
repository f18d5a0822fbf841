"""Launches of small Triton kernels through the emulator: specialisation, lints and perturbation."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")
if torch.cuda.is_available():
    pytest.skip("on a GPU kernels are launched there", allow_module_level=True)

import triton
import triton.language as tl
from ptx.emulator import Emulator, poison, poisoned_allocations


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def sum_of_flags_kernel(out_ptr, A: tl.constexpr, B: tl.constexpr):
    flags = (A, B)
    tl.store(out_ptr, flags[0] + flags[1])


@triton.jit
def difference_of_exponentials_kernel(x_ptr, out_ptr):
    """2^x - 2^(x + 2^-12) at x of order 1: the noise of ex2 is large against the result."""
    at = tl.arange(0, 32)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.exp2(x + 0.000244140625) - tl.exp2(x))


@triton.jit
def fused_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 32)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * x - 1.00048828125)


@pytest.fixture
def own():
    """An emulator of the test's own: what it finds does not count for the session."""
    with Emulator().installed() as emulator:
        yield emulator


def test_a_kernel_computes_on_cpu_tensors_and_is_compiled_once(own):
    x = torch.randn(100)
    for factor in (2.0, 3.0):
        out = torch.empty_like(x)
        scale_kernel[(4,)](x, out, factor, 100, BLOCK=32)
        assert torch.equal(out, factor * x)
    assert len(own.launches) == 1
    assert not own.issues


def test_a_launch_is_specialised_as_on_a_gpu(own):
    """Triton assumes that aligned pointers and multiples of 16 stay so, and makes the integer 1 a constant."""
    x = torch.randn(65)
    for tensor, n in ((x[:64], 64), (x[1:], 64), (x[:64], 1), (x[:64], 63)):
        scale_kernel[(4,)](tensor, torch.empty(64), 2.0, n, BLOCK=32)
    assert len(own.launches) == 4
    names = [sorted(name for name, _ in launch.attributes) for launch in own.launches]
    assert names[0] == ["n", "out_ptr", "x_ptr"]
    assert names[1] == ["n", "out_ptr"]
    assert dict(list(own.launches)[2].constexprs)["n"] == 1


@triton.jit
def last_program_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


def test_the_order_of_programs_depends_on_the_seed_and_the_number_of_the_launch():
    """A test that starts at launch 0 has the same order alone and after other tests."""

    def last_programs(emulator):
        emulator.number, found = 0, []
        with emulator.installed():
            for _ in range(3):
                out = torch.zeros(1, dtype=torch.int32)
                last_program_kernel[(100,)](out)
                found.append(out.item())
        return found

    one = Emulator(seed=1)
    first = last_programs(one)
    assert last_programs(one) == first
    assert len(set(first)) > 1
    assert last_programs(Emulator(seed=9)) != first


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,)])
def test_a_grid_that_no_gpu_can_run_raises_an_error(own, grid):
    with pytest.raises(ValueError, match="no GPU can run a grid"):
        last_program_kernel[grid](torch.zeros(1, dtype=torch.int32))


def test_all_architectures_compute_the_same():
    x = torch.randn(64)
    for architecture in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        with Emulator(architecture).installed() as emulator:
            out = torch.empty(64)
            scale_kernel[(2,)](x, out, 0.5, 64, BLOCK=32)
        assert torch.equal(out, x / 2), architecture
        assert not emulator.issues


def test_sums_of_flags_from_a_tuple_are_reported(own):
    out = torch.zeros(1, dtype=torch.int32)
    sum_of_flags_kernel[(1,)](out, A=True, B=True)
    assert out.item() == 0  # modulo 2, where Python says 2
    assert {issue.message for issue in own.issues} == {"integer arithmetic on bools, modulo 2"}


def test_results_that_depend_on_the_last_bits_of_an_approximation_differ_by_more_than_twice_eager():
    x = torch.linspace(0.5, 1.0, 32)
    truth = torch.exp2(x.double() + 2.0**-12) - torch.exp2(x.double())
    eager = (torch.exp2(x + 2.0**-12) - torch.exp2(x) - truth).abs().max()
    errors = {}
    for amplitude in (0.0, 1.0):
        with Emulator(amplitude=amplitude).installed():
            out = torch.empty(32)
            difference_of_exponentials_kernel[(1,)](x, out)
        errors[amplitude] = (out - truth).abs().max()
    assert errors[0.0] <= 2 * eager
    assert errors[1.0] > 2 * eager


def test_a_contraction_is_run_both_ways_and_turned_off_by_the_launch_option():
    x, results = torch.full((32,), 1 + 2.0**-12), {}
    for fusion in (True, False):
        for contract in (True, False):
            emulator = Emulator()
            emulator.contract = contract
            with emulator.installed():
                out = torch.empty(32)
                fused_kernel[(1,)](x, out, enable_fp_fusion=fusion)
            results[fusion, contract] = out[0].item()
    assert results[False, True] == results[False, False] == 0.0
    assert results[True, True] == 2.0**-24


def test_new_tensors_are_poisoned_inside_the_block_only():
    empty = torch.empty
    with poisoned_allocations():
        x = torch.empty(4)
        assert x.isnan().all()
        assert torch.zeros(4).new_empty(3).isnan().all()
        assert poison(torch.zeros(2, dtype=torch.int64))[0] > 10**18
    assert torch.empty is empty


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0), mask=at < n)


def test_a_store_outside_of_a_view_is_reported(own):
    """The storage has more elements than the view."""
    for n, message in ((7, set()), (8, {"store outside of the view out_ptr"})):
        copy_kernel[(1,)](torch.ones(8), torch.empty(16)[:7], n, BLOCK=16)
        assert {issue.message for issue in own.issues} == message


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_every_second_element_that_was_never_written_is_reported(own, dtype):
    x = poison(torch.empty(64, dtype=dtype))
    x[::2] = 1
    copy_kernel[(1,)](x, torch.empty_like(x), 64, BLOCK=64)
    assert "load of bytes of x_ptr that have never been written" in {issue.message for issue in own.issues}


def test_every_value_of_int8_may_be_loaded(own):
    x, out = torch.arange(-128, 128).to(torch.int8), torch.empty(256, dtype=torch.int8)
    copy_kernel[(1,)](x, out, 256, BLOCK=256)
    assert torch.equal(x, out)
    assert not own.issues


def test_memory_with_large_strides_needs_no_shadow_memory(own):
    """An element 2^31 elements away; only the pages that are touched exist."""
    x = torch.empty(2**31 + 64)[:: 2**31][:2]
    x[0], x[1] = 3.0, 4.0
    out = torch.empty(2)

    @triton.jit
    def far_kernel(x_ptr, out_ptr, stride):
        tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride))

    far_kernel[(2,)](x, out, x.stride(0))
    assert out.tolist() == [3.0, 4.0]
    assert not own.issues
