"""gae of every backend against the reference in fp64: layouts, flags, hostile values, and what must not recompile."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import static
import torch
from support import variants
from support.backends import TORCH, TRITON
from support.backends import values_unread as values_unread_fixture
from support.gae_cases import backend as backend_fixture
from support.gae_cases import check, double, everything
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference
from ppo_fast.kernels.common import numba_threads
from ppo_fast.kernels.gae import eager, launch

backend = backend_fixture
values_unread = values_unread_fixture
pytestmark = pytest.mark.usefixtures("nan_empty")

CPU_ONLY = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def tensors_on_the_device(device: torch.device) -> Iterator[None]:
    """On a GPU every tensor of a test is made there."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@pytest.mark.parametrize("T", [1, 7, 63, 130])
def test_padded_rows_match_the_reference(backend, T):
    check(backend, rewards=torch.randn(3, T), values=torch.randn(3, T), gamma=0.99, lam=0.95)
    check(backend, **everything((3, T), 3), gamma=0.99, lam=0.95)
    check(backend, **everything((3, T), 3), gamma=torch.rand(3), lam=torch.rand(3))


@pytest.mark.parametrize("rows", [3, 4, 6, 8, 9])
@pytest.mark.parametrize("flags", [(), ("mask",), ("terminated",), ("mask", "terminated")], ids=str)
def test_rows_processed_side_by_side_match_the_reference(backend, rows, flags):
    """A CPU processes rows side by side; the last ones alone."""
    options = {**everything((rows, 19), rows), "gamma": torch.rand(rows), "lam": torch.rand(rows)}
    if "mask" not in flags:
        options |= {name: torch.randn(rows, 19) for name in ("rewards", "values")}
    kept = {"rewards", "values", "gamma", "lam", "bootstrap", *flags}
    check(backend, **{name: x for name, x in options.items() if name in kept})
    views = {name: x.T.contiguous().T for name, x in options.items() if name in kept and x.ndim == 2}
    check(backend, **{name: views.get(name, x) for name, x in options.items() if name in kept})


def test_rows_longer_than_a_span_match_the_reference(backend):
    """Several spans, so that Triton composes them in one launch and applies them in another."""
    assert launch.LAYOUTS[launch.row_layout(1500)].W * launch.LAYOUTS[launch.row_layout(1500)].tiles < 1500
    check(backend, **everything((2, 1500), 2), gamma=0.999, lam=0.99)


def test_many_rows_with_one_program_each_match_the_reference(backend, monkeypatch):
    monkeypatch.setattr(launch, "MANY_ROWS", 2)
    check(backend, **everything((2, 1100), 2), gamma=0.999, lam=0.99)


@pytest.mark.parametrize(("T", "N"), [(1, 1), (5, 7), (70, 3)])
def test_time_major_equals_batch_first_transposed(backend, T, N):
    options = everything((T, N), N)
    check(backend, **options, gamma=0.99, lam=0.95, time_major=True)
    flipped = {k: x if k == "bootstrap" else x.T for k, x in options.items()}
    for a, b in zip(
        backend(**options, gamma=0.99, lam=0.95, time_major=True), backend(**flipped, gamma=0.99, lam=0.95), strict=True
    ):
        torch.testing.assert_close(a, b.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [3, 0, 9, 1], [130, 1, 0, 300, 64, 128, 0], [0, 0, 2]])
def test_packed_sequences_are_independent(backend, lengths):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    options = everything((sum(lengths),), len(lengths))
    check(backend, **options, gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens)
    check(backend, **options, gamma=torch.rand(len(lengths)), lam=0.95, cu_seqlens=cu_seqlens.int())


def test_gae_without_discount_is_monte_carlo_and_without_trace_the_td_error(backend):
    r, v = torch.randn(2, 4, 50)
    _, returns = backend(r, v, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, r.flip(-1).cumsum(-1).flip(-1), rtol=0, atol=2e-5)
    advantages, _ = backend(r, v, gamma=0.0, lam=1.0)
    torch.testing.assert_close(advantages, r - v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + ([] if CPU_ONLY else [torch.bfloat16]))
def test_half_precision_inputs_are_computed_in_fp32(backend, dtype):
    options = {k: x.to(dtype) if x.is_floating_point() else x for k, x in everything((3, 40), 3).items()}
    check(backend, **options, gamma=0.99, lam=0.95)


def test_transposed_sliced_and_expanded_views_match_the_reference(backend):
    big = torch.randn(2, 80, 9)
    check(backend, rewards=big[0, ::2, 1:8].T, values=big[1, 1::2, :7].T, gamma=0.9, lam=0.9)
    check(backend, rewards=torch.randn(1, 30).expand(4, 30), values=torch.randn(4, 1).expand(4, 30), gamma=0.9, lam=0.9)
    check(backend, rewards=big, values=big + 1, gamma=0.9, lam=0.9, bootstrap=torch.randn(2, 80))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty_tensors_give_empty_results(backend, shape):
    for x in backend(torch.zeros(shape), torch.zeros(shape)):
        assert x.shape == shape


def test_all_masked_gives_zero(backend):
    nan = torch.full((2, 9), torch.nan)
    for x in backend(nan, nan, mask=torch.zeros(2, 9, dtype=torch.bool)):
        assert not x.any()


def test_a_reward_after_an_end_does_not_reach_the_steps_before_it(backend):
    """Not even infinity may pass a cut."""
    rewards = torch.tensor([[1.0, 1.0, torch.inf]])
    ends = torch.tensor([[False, True, False]])
    advantages, _ = backend(rewards, torch.zeros(1, 3), gamma=0.9, lam=0.9, terminated=ends)
    torch.testing.assert_close(advantages[:, :2], torch.tensor([[1.81, 1.0]]))


def test_a_rows_bits_do_not_depend_on_other_rows(backend):
    options = everything((9, 200), 9)
    together = backend(**options, gamma=0.99, lam=0.95)
    alone = backend(**{k: x[4:5] for k, x in options.items()}, gamma=0.99, lam=0.95)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[4:5], b)


def test_repeats_have_the_same_bits(backend):
    options = everything((3, 100), 3)
    first = backend(**options, gamma=0.99, lam=0.95)
    for _ in range(5):
        assert all(map(torch.equal, first, backend(**options, gamma=0.99, lam=0.95)))


def test_a_long_row_without_numba_takes_milliseconds(monkeypatch):
    """65536 steps take milliseconds; a loop over them would take seconds."""
    import time

    monkeypatch.setattr(eager, "numba_works", lambda: False)
    options = everything((2, 65536), 2)
    start = time.perf_counter()
    result = TORCH.gae(**options, gamma=0.999, lam=0.99)
    assert time.perf_counter() - start < 2
    for actual, truth in zip(result, reference.gae(**double(options), gamma=0.999, lam=0.99), strict=True):
        assert (actual.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", ["gae columns float32 aligned", "gae columns compose float32 aligned"])
def test_time_major_kernels_load_16_bytes_and_have_no_barrier(name):
    kernel = variants.compiled(next(variant for variant in launch.variants() if variant.name == name))
    assert "bar.sync" not in kernel.asm["ptx"]
    loads = static.cuda_report(kernel.asm["cubin"], kernel.metadata.shared, disassemble=True).loads
    assert loads["128"] >= 3 * launch.LAYOUTS["columns"].W  # rewards, values and final values of each step of a tile


@pytest.mark.parametrize(("time_major", "rows", "T"), [(False, 3, 700), (True, 3, 136), (True, 130, 136)])
def test_two_launches_give_the_bits_of_one(monkeypatch, time_major, rows, T):
    """Also where rows do not fill the last program, whose other lanes must not read the maps of spans."""
    shape = (T, rows) if time_major else (rows, T)
    options = {**everything(shape, rows), "gamma": torch.rand(rows), "lam": 0.95, "time_major": time_major}
    split = TRITON.gae(**options)
    monkeypatch.setattr(launch, "_MANY_COLUMNS" if time_major else "MANY_ROWS", 1)
    assert all(map(torch.equal, split, TRITON.gae(**options)))


def test_triton_reads_negated_views_with_their_sign():
    """PyTorch negates such a view lazily: its memory has the other sign."""
    options = {**everything((3, 40), 3), "gamma": torch.rand(3), "lam": 0.9}
    names = ("rewards", "values", "final_values", "bootstrap", "gamma")
    negated = {name: torch._neg_view(-options[name]) for name in names}
    assert all(map(torch.equal, TRITON.gae(**options | negated), TRITON.gae(**options)))


def test_triton_reads_inputs_of_several_dtypes_and_strides():
    options = {**everything((3, 41), 3), "gamma": torch.rand(3).double(), "lam": 0.9}
    options = {name: x[:, :40] if isinstance(x, Tensor) and x.ndim == 2 else x for name, x in options.items()}
    options |= {name: options[name].half() for name in ("values", "bootstrap")}
    check(TRITON.gae, **options | {name: options[name].contiguous() for name in ("terminated", "final_values")})


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("inside", [[0, 5, 5, 140], [3, 140, 141], [0, 0], [7, 7]])
def test_steps_outside_all_packed_sequences_are_zero(inside, dtype):
    """On a GPU cu_seqlens is not checked before the launch, so it may be short."""
    total, rows = 200, len(inside) - 1
    options = {**everything((total,), rows), "gamma": torch.rand(rows), "lam": 0.95}
    actual = TRITON.gae(**options, cu_seqlens=torch.tensor(inside, dtype=dtype))
    own = {k: x[inside[0] : inside[-1]] if len(x) == total else x for k, x in options.items() if k != "lam"}
    shifted = torch.tensor(inside) - inside[0]
    for x, truth in zip(actual, reference.gae(**double(own), lam=0.95, cu_seqlens=shifted), strict=True):
        assert (x[inside[0] : inside[-1]].double() - truth).abs().max().nan_to_num() <= 1e-4 if len(truth) else True
        assert not x[: inside[0]].any()
        assert not x[inside[-1] :].any()


@pytest.mark.parametrize("wrong", [[0, 10**9, 200], [-(10**9), 60, 200], [0, 150, 20, 200], [200, 0], [90, 80, 70, 60]])
@pytest.mark.usefixtures("programs_may_overlap", "values_unread")
def test_wrong_packed_boundaries_are_bounded(wrong):
    """Every address stays inside the tensors, whatever cu_seqlens contains."""
    for x in TRITON.gae(**everything((200,), len(wrong) - 1), cu_seqlens=torch.tensor(wrong)):
        assert x.shape == (200,)


@pytest.mark.usefixtures("values_unread")
def test_packed_boundaries_beyond_the_end_are_the_end():
    options = everything((200,), 3)
    beyond = TRITON.gae(**options, cu_seqlens=torch.tensor([0, 60, 10**9, 2 * 10**9]))
    assert all(map(torch.equal, beyond, TRITON.gae(**options, cu_seqlens=torch.tensor([0, 60, 200, 200]))))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("shape", [(4096, 128), (64, 32768), (16, 65536), (3, 1000)])
def test_gpu_results_are_exact_and_repeat(device, shape):
    options = {k: x.to(device) for k, x in everything(shape, shape[0]).items()}
    first = TRITON.gae(**options, gamma=0.99, lam=0.95)
    truth = TORCH.gae(**double(options), gamma=0.99, lam=0.95)
    for actual, expected in zip(first, truth, strict=True):
        assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    for _ in range(100):
        assert all(map(torch.equal, first, TRITON.gae(**options, gamma=0.99, lam=0.95)))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_compiled_gae_is_reused_for_other_lengths_and_discounts(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    import ppo_fast as ppo

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(r: Tensor, v: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        return ppo.gae(r, v, gamma=gamma, lam=0.95, backend=name)

    for i in range(12):
        r, v = torch.randn(2, 2, 5 + i)
        for a, b in zip(compiled(r, v, 0.5 + 0.04 * i), reference.gae(r, v, gamma=0.5 + 0.04 * i), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("time_major", [False, True])
def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch, time_major):
    """Every thread has its own rows (also where rows don't divide evenly, and beyond one per row)."""
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(numba_threads, "_STEPS_PER_THREAD", 1)
    shape = (50, 11) if time_major else (11, 50)
    options = {"rewards": torch.randn(shape), "values": torch.randn(shape), "terminated": torch.rand(shape) < 0.1}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found.append(ppo.gae(**options, time_major=time_major))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_an_error_in_a_helping_thread_is_raised():
    before = torch.get_num_threads()

    caller = threading.get_ident()
    helped = threading.Event()

    def work(number: int) -> None:
        if threading.get_ident() == caller:
            helped.wait(timeout=60)
        else:
            helped.set()
            raise ArithmeticError("of the helper")

    try:
        torch.set_num_threads(2)
        with pytest.raises(ArithmeticError, match="of the helper"):
            numba_threads.in_threads(work, 4, 2)
    finally:
        torch.set_num_threads(before)


BROKEN_NUMBA = """
import sys, warnings
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.core":
            raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 9.9.")
sys.meta_path.insert(0, Broken())
import torch, ppo_fast as ppo
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    advantages, _ = ppo.gae(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), gamma=0.5, lam=1.0)
    x = torch.zeros(3, requires_grad=True)
    ppo.ppo_loss(x, x, x.detach(), x.detach(), torch.ones(3), torch.ones(3)).loss.backward()
    ppo.masked_whiten(torch.arange(4.0))
print(advantages.tolist(), [str(w.message) for w in told if "numba" in str(w.message)])
"""


def test_a_numba_that_cannot_be_imported_warns_once_and_pytorch_computes():
    pytest.importorskip("numba", reason="numba is not installed")
    done = subprocess.run([sys.executable, "-c", BROKEN_NUMBA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "[[2.0, 2.0]] ['numba is installed but cannot be imported (Numba needs NumPy 2.2 or less. Got NumPy 9.9.): the"
        " operations on the CPU use PyTorch alone, which is slower']"
    )
