"""shape_rewards, masked_whiten and rlhf_advantages in Triton against the reference in fp64, one process and two."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import variants
from support.accuracy import assert_error_at_most_twice_eager as assert_close
from support.backends import TORCH, TRITON
from support.backends import values_unread as values_unread_fixture
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.kernels import reference
from ppo_fast.kernels.advantages import eager, launch
from ppo_fast.kernels.advantages.options import WhiteningOptions

pytestmark = pytest.mark.usefixtures("nan_empty")
values_unread = values_unread_fixture
ROOT = Path(__file__).parents[2]
KERNELS = ("advantages_kernel", "whiten_kernel", "moments_kernel", "merge_kernel", "shape_kernel")
DTYPES = [torch.float16, torch.float32, torch.bfloat16]
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are compared with PyTorch's operations in fp32; numba's loops, which sum in fp64, would be stricter."""
    monkeypatch.setattr(eager, "numba_works", lambda: False)


def make(B: int, T: int, *, dtype: torch.dtype = torch.float32, slack: bool = False, per_token: bool = False) -> Inputs:
    """Rows with gaps, one of them without a counted step; NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(B * 1000 + T)
    mask = torch.rand(B, T, generator=g) < 0.6
    if B > 1:
        mask[1] = False
        mask[0, -1] = True
    spoiled = {k: torch.where(mask, torch.randn(B, T, generator=g), torch.nan) for k in ("logprobs", "ref_logprobs")}
    values = torch.where(mask, torch.randn(B, T, generator=g), 0.25 if slack else torch.nan)
    scores = torch.where(mask, torch.randn(B, T, generator=g), torch.nan) if per_token else torch.randn(B, generator=g)
    if not per_token:
        scores = torch.where(mask.any(-1), 3 * scores, torch.nan)
    floats = {"scores": scores, **spoiled, "values": values}
    return {k: x.to(dtype) for k, x in floats.items()} | {"mask": mask}


def double(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}


def on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}


def check(device: torch.device, name: str, **options: Any) -> None:
    """At most twice the torch backend's error, in every tensor and every statistic."""
    actual = getattr(TRITON, name)(**on(device, options))
    by_torch = getattr(TORCH, name)(**options)
    truth = getattr(reference, name)(**double(options))
    if isinstance(actual, Tensor):
        actual, by_torch, truth = (actual,), (by_torch,), (truth,)
    assert len(actual) == len(truth)
    for i, (a, e, t) in enumerate(zip(actual, by_torch, truth, strict=True)):
        pairs = {str(i): (a, e, t)} if isinstance(t, Tensor) else {k: (a[k], e[k], t[k]) for k in t}
        assert isinstance(t, Tensor) or set(a) == set(t)
        for k, (x, y, z) in pairs.items():
            assert x.dtype == (torch.bool if z.dtype == torch.bool else torch.float32)
            assert not x.requires_grad
            assert_close(x, y, z, name=k)


@pytest.mark.parametrize("T", [1, 9, 63, 300])
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
def test_advantages_of_short_and_long_rows_match_the_reference(device, T, reward_at):
    """300 steps in one span; one row has no counted step, another ends with one."""
    x = make(5, T, slack=reward_at == "after_last")
    options = {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.2, "reward_at": reward_at, "bootstrap": torch.randn(5)}
    check(device, "rlhf_advantages", **x, **options)


@pytest.mark.parametrize("walked", [True, False])
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
def test_the_score_is_kept_at_the_boundary_of_two_spans(device, monkeypatch, walked, reward_at):
    """1100 steps in three spans; the score is on both sides of a boundary, and far from the end of its row."""
    monkeypatch.setattr(launch, "_ONE_PASS_SPANS", 3 if walked else 1)
    x = make(4, 1100, slack=True)
    for row, length in enumerate((511, 512, 513, 30)):
        x["mask"][row, :length] |= torch.arange(length) % 7 > 2
        x["mask"][row, length - 1], x["mask"][row, length:] = True, False
    x |= {k: x[k].nan_to_num(0.5) for k in ("scores", "logprobs", "ref_logprobs")}
    check(device, "rlhf_advantages", **x, gamma=0.99, lam=0.95, reward_at=reward_at)
    del x["values"]
    check(device, "shape_rewards", **x, reward_at=reward_at)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_computed_in_fp32(device, dtype):
    check(device, "rlhf_advantages", **make(4, 40, dtype=dtype), gamma=0.99)


@pytest.mark.parametrize("kl_estimator", reference.KL_ESTIMATORS)
def test_rewards_use_the_given_kl_estimator(device, kl_estimator):
    x = make(5, 12)
    x["logprobs"][0, -1] += 50  # k3's exponent is clamped
    del x["values"]
    for clip in (None, 1.0):
        check(device, "shape_rewards", **x, kl_coef=0.3, kl_estimator=kl_estimator, score_clip=clip)


def test_token_scores_match_the_reference(device):
    x = make(4, 40, per_token=True)
    check(device, "rlhf_advantages", **x, score_clip=0.5, lam=torch.rand(4), gamma=torch.rand(4))
    del x["values"]
    check(device, "shape_rewards", **x, score_clip=0.5)


@pytest.mark.parametrize(
    "option", [{"whiten": False}, {"shift_mean": False}, {"unbiased": False}, {"eps": 0.5}, {"min_std": 3.0}]
)
def test_options_of_whitening_match_the_reference(device, option):
    check(device, "rlhf_advantages", **make(5, 9), **option)
    if "whiten" not in option:
        x = make(5, 9)
        check(device, "masked_whiten", x=x["values"], mask=x["mask"], **option)


@pytest.mark.parametrize("T", [1, 9, 63, 300])
@pytest.mark.parametrize("critic_lam", [1.0, torch.linspace(0, 1, 5)], ids=["float", "tensor"])
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
def test_returns_have_a_lambda_of_their_own(device, T, critic_lam, reward_at):
    """Every subset of the numbers per row is given once."""
    x = make(5, T, slack=reward_at == "after_last")
    options = {"kl_coef": 0.2, "reward_at": reward_at, "critic_lam": critic_lam}
    lams, gammas, bootstrap = torch.rand(5), torch.rand(5), torch.randn(5)
    for given in range(8):
        options |= {"lam": lams if given & 1 else 0.8, "gamma": gammas if given & 2 else 0.9}
        check(device, "rlhf_advantages", **x, **options, bootstrap=bootstrap if given & 4 else None)


@pytest.mark.parametrize("walked", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_two_lambdas_pass_from_span_to_span(device, monkeypatch, walked, per_token):
    monkeypatch.setattr(launch, "_ONE_PASS_SPANS", 3 if walked else 1)
    x = make(4, 1100, per_token=per_token)
    for critic_lam in (1.0, torch.rand(4)):
        check(device, "rlhf_advantages", **x, gamma=0.99, lam=0.9, critic_lam=critic_lam)


def test_a_second_lambda_changes_no_bit_of_the_advantages(device, monkeypatch):
    x = on(device, make(2, 600))
    for spans in (4, 1):
        monkeypatch.setattr(launch, "_ONE_PASS_SPANS", spans)
        one = TRITON.rlhf_advantages(**x, lam=0.9)
        for critic_lam in (0.9, 0.3):
            two = TRITON.rlhf_advantages(**x, lam=0.9, critic_lam=critic_lam)
            same = [torch.equal(a, b) for a, b in zip(two[:4], one[:4], strict=True)]
            assert same == [True, critic_lam == 0.9, True, True]


def test_two_lambdas_in_one_program_and_in_several_give_the_same_bits(device, monkeypatch):
    x = on(device, make(2, 600))
    walked = TRITON.rlhf_advantages(**x, critic_lam=0.7, whiten=False)[:4]
    monkeypatch.setattr(launch, "_ONE_PASS_SPANS", 1)
    assert all(map(torch.equal, walked, TRITON.rlhf_advantages(**x, critic_lam=0.7, whiten=False)[:4]))


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("floor", [0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_min_std_is_read_on_the_device(device, floor, dtype):
    """The spread is about 1: a floor below it changes no bit."""
    x, given = make(5, 9), torch.tensor(floor, dtype=dtype)
    check(device, "masked_whiten", x=x["values"], mask=x["mask"], min_std=given)
    check(device, "rlhf_advantages", **x, min_std=given)
    x = on(device, x)
    plain = TRITON.masked_whiten(x["values"], x["mask"])
    floored = TRITON.masked_whiten(x["values"], x["mask"], min_std=given.to(device))
    assert torch.equal(floored, plain) == (floor < 1)


def test_equal_elements_with_min_std_are_zero_without_eps(device):
    x = torch.full((5,), 3.0, device=device)
    assert TRITON.masked_whiten(x, eps=0.0).isnan().all()
    assert not TRITON.masked_whiten(x, eps=0.0, min_std=0.1).any()


def test_whitening_takes_any_shape_with_and_without_a_mask(device):
    check(device, "masked_whiten", x=torch.randn(3, 5, 7))
    check(device, "masked_whiten", x=torch.randn(()))
    big = torch.randn(6, 700)
    check(device, "masked_whiten", x=big[:, 3:603], mask=torch.rand(6, 600) < 0.5)
    check(device, "masked_whiten", x=big[:, ::5], mask=(torch.rand(140, 6) < 0.5).T)


def test_whitening_keeps_its_digits_where_the_mean_is_large(device):
    check(device, "masked_whiten", x=1e4 + torch.randn(40, 1000))


def test_partial_results_of_many_programs_are_merged_exactly(device, monkeypatch):
    """More partial results than are merged at once, and more tiles than programs."""
    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "_PROGRAMS", 520)
    check(device, "masked_whiten", x=5 + torch.randn(530, 16), mask=torch.rand(530, 16) < 0.7)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_tensors_give_empty_results(device, shape):
    x = make(1, 1) | {"mask": torch.zeros(shape, dtype=torch.bool), "scores": torch.zeros(shape[0])}
    x |= {k: torch.zeros(shape) for k in ("logprobs", "ref_logprobs", "values")}
    x = on(device, x)
    *outputs, stats = TRITON.rlhf_advantages(**x)
    assert all(y.shape == shape for y in outputs)
    assert not any(s.item() for s in stats.values())
    assert TRITON.masked_whiten(x["values"], x["mask"]).shape == shape
    del x["values"]
    assert [y.shape for y in TRITON.shape_rewards(**x, reward_at="after_last")] == [shape] * 3


def test_all_masked_gives_zero(device):
    nan = torch.full((3, 9), torch.nan, device=device)
    mask = torch.zeros(3, 9, dtype=torch.bool, device=device)
    *outputs, stats = TRITON.rlhf_advantages(nan[:, 0], nan, nan, nan, mask, gamma=0.9)
    assert not any(x.any() for x in (*outputs, *stats.values()))
    assert not TRITON.masked_whiten(nan, mask).any()


def test_one_counted_element_is_not_scaled(device):
    x, mask = torch.tensor([3.0, torch.nan], device=device), torch.tensor([True, False], device=device)
    assert TRITON.masked_whiten(x, mask).tolist() == [0.0, 0.0]
    assert TRITON.masked_whiten(x, mask, shift_mean=False).tolist() == [3.0, 0.0]


def test_views_match_the_reference(device):
    x = make(6, 40)
    wide = {k: torch.full((6, 90), torch.nan) for k in ("logprobs", "values")}
    for k, w in wide.items():
        w[:, 10:50] = x[k]
    transposed = {k: x[k].T.contiguous().T for k in ("ref_logprobs", "mask")}
    views = x | {k: w[:, 10:50] for k, w in wide.items()} | transposed
    check(device, "rlhf_advantages", **views | {"scores": torch.ones(6, 3)[:, 1]})


def test_negated_views_are_read_with_their_sign(device):
    """PyTorch negates such a view lazily: its memory has the other sign."""
    x = on(device, make(5, 70))
    negated = {k: torch._neg_view(-y) for k, y in x.items() if k != "mask"}
    *plain, _ = TRITON.rlhf_advantages(**x)
    assert all(map(torch.equal, TRITON.rlhf_advantages(**x | negated)[:4], plain))
    whitened = TRITON.masked_whiten(x["values"], x["mask"])
    assert torch.equal(TRITON.masked_whiten(negated["values"], x["mask"]), whitened)


def test_repeats_have_the_same_bits(device):
    x = on(device, make(5, 70))
    *first, stats = TRITON.rlhf_advantages(**x)
    for _ in range(3):
        *again, again_stats = TRITON.rlhf_advantages(**x)
        assert all(map(torch.equal, first, again))
        assert all(torch.equal(stats[k], again_stats[k]) for k in stats)


def test_a_rows_bits_do_not_depend_on_other_rows(device):
    x = on(device, make(9, 200))
    together = TRITON.rlhf_advantages(**x, whiten=False)[:4]
    alone = TRITON.rlhf_advantages(**{k: t[4:5] for k, t in x.items()}, whiten=False)[:4]
    assert all(torch.equal(a[4:5], b) for a, b in zip(together, alone, strict=True))


def test_one_program_and_several_give_a_row_the_same_bits(device, monkeypatch):
    x = on(device, make(2, 600))
    walked = TRITON.rlhf_advantages(**x, whiten=False)[:4]
    monkeypatch.setattr(launch, "_ONE_PASS_SPANS", 1)
    assert all(map(torch.equal, walked, TRITON.rlhf_advantages(**x, whiten=False)[:4]))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[str], name: str) -> None:
        self.kernel, self.launches, self.name = kernel, launches, name

    def run(self, *args: Any, **options: Any) -> Any:
        self.launches.append(self.name)
        return self.kernel.run(*args, **options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name), names, name))
    return names


def test_each_operation_takes_the_documented_number_of_launches(device, launches):
    for B, T, most in ((3, 20, 2), (2, 600, 2), (1, 2100, 3)):
        launches.clear()
        TRITON.rlhf_advantages(**on(device, make(B, T)))
        assert len(launches) == most, (B, T)
        launches.clear()
        TRITON.rlhf_advantages(**on(device, make(B, T)), critic_lam=1.0)
        assert len(launches) == most, (B, T)
    launches.clear()
    x = on(device, make(3, 20))
    TRITON.masked_whiten(x["values"], x["mask"])
    assert len(launches) == 2
    launches.clear()
    del x["values"]
    TRITON.shape_rewards(**x, reward_at="after_last")
    assert len(launches) == 1


def test_whitening_has_one_loop_each_for_moments_statistics_and_elements():
    """The statistics are read in one pass, not in one for each of them."""
    variant = next(v for v in launch.variants() if v.name == "whiten float32 aligned")
    assert variants.compiled(variant).asm["ptx"].count("Inner Loop Header") == 3


def test_statistics_of_more_programs_than_are_merged_at_once_are_exact(device):
    sums = torch.rand(9, 700, generator=torch.Generator().manual_seed(0))
    sums[0] = (9 * sums[0]).round()  # counts
    sums = sums.to(device)
    x, stats = torch.zeros(1, device=device), torch.empty(6, device=device)
    whitening = WhiteningOptions(shift_mean=True, unbiased=True, eps=1e-8, group=None)
    launch._apply_whitening(launch._flat(x, None), 0, x, sums, stats, whitening)
    total = sums.double().sum(1)
    expected = total[[3, 4, 5, 6]] / total[[7, 7, 0, 8]]
    mean = (sums[0] * sums[1]).double().sum() / total[0]
    torch.testing.assert_close(stats[:4].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[4].double(), mean, rtol=1e-5, atol=0)


def test_the_option_backend_selects_the_kernels(launches):
    x = make(2, 6)
    ppo.rlhf_advantages(**x, backend="torch")
    ppo.masked_whiten(x["values"], x["mask"], backend="torch")
    assert not launches
    ppo.rlhf_advantages(**x, backend="triton")
    ppo.masked_whiten(x["values"], x["mask"], backend="triton")
    del x["values"]
    ppo.shape_rewards(**x, backend="triton")
    assert launches == ["advantages_kernel", "whiten_kernel", "moments_kernel", "whiten_kernel", "shape_kernel"]


def test_compiled_code_is_reused_for_other_lengths_and_coefficients():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Inputs, kl_coef: float) -> tuple[Tensor, ...]:
        out = ppo.rlhf_advantages(**x, kl_coef=kl_coef, eps=kl_coef, gamma=kl_coef, backend="triton")
        shaped = {k: t for k, t in x.items() if k != "values"}
        rewards, _ = ppo.shape_rewards(**shaped, kl_coef=kl_coef, score_clip=kl_coef, backend="triton")
        return out.advantages, out.stats["kl_mean"], rewards, ppo.masked_whiten(rewards, x["mask"], backend="triton")

    for i in range(12):
        x, number = make(2 + i, 5 + i), 0.3 + 0.05 * i
        actual = compiled(x, number)
        out = TORCH.rlhf_advantages(**x, kl_coef=number, eps=number, gamma=number)
        del x["values"]
        rewards = TORCH.shape_rewards(**x, kl_coef=number, score_clip=number)[0]
        whitened = TORCH.masked_whiten(rewards, x["mask"])
        for a, e in zip(actual, (out[0], out[4]["kl_mean"], rewards, whitened), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("per_row", [True, False])
def test_compiled_code_is_reused_for_other_values_of_critic_lam(backend, per_row):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Inputs, critic_lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return ppo.rlhf_advantages(**x, critic_lam=critic_lam, backend=backend)[:2]

    x = make(4, 9)
    for i in range(12):
        critic_lam = torch.rand(4) if per_row else 0.3 + 0.05 * i
        expected = TORCH.rlhf_advantages(**x, critic_lam=critic_lam)
        for a, e in zip(compiled(x, critic_lam), expected[:2], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= (1 if per_row else 2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_compiled_code_is_reused_for_other_values_of_min_std(backend, as_tensor):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Inputs, floor: float | Tensor) -> tuple[Tensor, ...]:
        out = ppo.rlhf_advantages(**x, min_std=floor, backend=backend)
        return out.advantages, ppo.masked_whiten(out.rewards, x["mask"], min_std=floor, backend=backend)

    x = make(4, 9)
    for i in range(12):
        floor = 0.1 + 0.3 * i
        out = TORCH.rlhf_advantages(**x, min_std=floor)
        expected = out.advantages, TORCH.masked_whiten(out.rewards, x["mask"], min_std=floor)
        for a, e in zip(compiled(x, torch.tensor(floor) if as_tensor else floor), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= (1 if as_tensor else 2)


WORKER = """
import sys, torch, torch.distributed as dist
import ppo_fast as ppo
rank, store = int(sys.argv[1]), sys.argv[2]
if not torch.cuda.is_available():
    from ptx.emulator import Emulator
    emulator = Emulator()
    installed = emulator.installed()
    installed.__enter__()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
x, mask = 100 + torch.randn(7, 5), torch.rand(7, 5) < 0.7
scores, logprobs, refs = torch.randn(7), torch.randn(7, 5), torch.randn(7, 5)
mine = slice(0, 2) if rank == 0 else slice(2, 7)
group = dist.group.WORLD
whole = ppo.masked_whiten(x, mask, backend="triton")
part = ppo.masked_whiten(x[mine], mask[mine], group=group, backend="triton")
assert (part - whole[mine]).abs().max() < 1e-5, (part - whole[mine]).abs().max()
part = ppo.masked_whiten(x[mine], mask[mine], group=group, min_std=20.0, backend="triton")
assert (part - ppo.masked_whiten(x, mask, min_std=20.0, backend="triton")[mine]).abs().max() < 1e-6
alone = ppo.masked_whiten(x[mine], mask[mine], backend="triton")
assert (alone - whole[mine]).abs().max() > 1e-3, "the split makes no difference, so nothing is shown"
whole = ppo.rlhf_advantages(scores, logprobs, refs, x, mask, backend="triton")
parts = [t[mine] for t in (scores, logprobs, refs, x, mask)]
part = ppo.rlhf_advantages(*parts, group=group, backend="triton")
assert (part.advantages - whole.advantages[mine]).abs().max() < 1e-4
for name in ("advantage_mean", "advantage_std"):
    torch.testing.assert_close(part.stats[name], whole.stats[name], rtol=1e-5, atol=1e-5)
empty = [t[:0] if rank == 0 else t for t in (scores, logprobs, refs, x, mask)]
part = ppo.rlhf_advantages(*empty, group=group, backend="triton")
torch.testing.assert_close(part.stats["advantage_std"], whole.stats["advantage_std"], rtol=1e-5, atol=1e-5)
assert ppo.masked_whiten(empty[3], empty[4], group=group, backend="triton").shape == empty[3].shape
if not torch.cuda.is_available():
    assert emulator.launches and not emulator.issues, [str(issue) for issue in emulator.issues]
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_whiten_as_one(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("shape", [(4096, 128), (64, 32768), (16, 65536), (3, 1000)])
def test_gpu_results_are_exact_and_repeat(device, shape):
    x = on(device, make(*shape))
    *first, stats = TRITON.rlhf_advantages(**x, gamma=0.99, lam=0.95)
    *truth, true_stats = TORCH.rlhf_advantages(**double(x), gamma=0.99, lam=0.95)
    for actual, expected in zip(first, truth, strict=True):
        assert (actual.double() - expected).abs().max() <= 2e-5 * expected.abs().max()
    for k, expected in true_stats.items():
        torch.testing.assert_close(stats[k].double(), expected, rtol=1e-4, atol=1e-4)
    for _ in range(100):
        assert all(map(torch.equal, first, TRITON.rlhf_advantages(**x, gamma=0.99, lam=0.95)[:4]))
