"""shape_rewards, masked_whiten and rlhf_advantages against the reference in fp64, and over two processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import TORCH
from support.backends import values_unread as values_unread_fixture
from torch import Tensor

from ppo_fast.kernels import reference
from ppo_fast.kernels.advantages import eager
from ppo_fast.kernels.gae import cpu as gae_cpu
from ppo_fast.kernels.gae import eager as gae_eager

pytestmark = pytest.mark.usefixtures("nan_empty")
values_unread = values_unread_fixture
ROOT = Path(__file__).parents[2]


def make(B: int = 5, T: int = 9, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.6
    mask[1] = False
    mask[2, -1] = True
    spoiled = {
        k: torch.where(mask, torch.randn(B, T, generator=g), torch.nan) for k in ("logprobs", "ref_logprobs", "values")
    }
    scores = 3 * torch.randn(B, generator=g)
    scores[1] = torch.nan  # a row without a counted token has no score
    return spoiled | {"scores": scores, "mask": mask}


def double(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}


def close(actual: tuple, truth: tuple) -> None:
    """Within fp32 rounding of sums over a few dozen terms."""
    assert len(actual) == len(truth)
    for a, t in zip(actual, truth, strict=True):
        if isinstance(a, dict):
            assert set(a) == set(t)
            close(tuple(a[k] for k in t), tuple(t.values()))
        else:
            assert not a.requires_grad
            torch.testing.assert_close(a.to(t.dtype), t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl_estimator", reference.KL_ESTIMATORS)
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
def test_rewards_match_the_reference(kl_estimator, reward_at):
    x = make()
    del x["values"]
    options = dict(kl_coef=0.3, kl_estimator=kl_estimator, score_clip=1.0, reward_at=reward_at)
    close(TORCH.shape_rewards(**x, **options), reference.shape_rewards(**double(x), **options))


def test_token_scores_match_the_reference():
    x = make()
    x["scores"] = torch.where(x["mask"], torch.randn(5, 9), torch.nan)
    del x["values"]
    close(TORCH.shape_rewards(**x), reference.shape_rewards(**double(x)))


def test_after_last_puts_the_score_one_slot_later_by_hand():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    zero = torch.zeros(2, 4)
    rewards, _, longer = TORCH.shape_rewards(torch.tensor([1.0, 2.0]), zero, zero, mask, reward_at="after_last")
    assert (rewards + 0.0).tolist() == [[0, 0, 1, 0], [0, 0, 0, 2]]
    assert longer.tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_matches_the_reference(shift_mean, unbiased):
    x = make()
    options = dict(shift_mean=shift_mean, unbiased=unbiased)
    actual = TORCH.masked_whiten(x["values"], x["mask"], **options)
    close((actual,), (reference.masked_whiten(x["values"].double(), x["mask"], **options),))
    assert not actual[~x["mask"]].any()


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("floor", [0.5, 30.0])
def test_the_divisor_of_whitening_is_never_below_min_std(monkeypatch, numba, floor):
    """The spread is about 1; a number, and a tensor on the device."""
    if not numba:
        monkeypatch.setattr(eager, "numba_works", lambda: False)
    x = make()
    for given in (floor, torch.tensor(floor), torch.tensor(floor, dtype=torch.float64)):
        for options in ({}, {"shift_mean": False}, {"unbiased": False, "eps": 0.1}):
            actual = TORCH.masked_whiten(x["values"], x["mask"], min_std=given, **options)
            truth = reference.masked_whiten(x["values"].double(), x["mask"], min_std=floor, **options)
            close((actual,), (truth,))
        close(
            TORCH.rlhf_advantages(**x, kl_coef=0.2, min_std=given),
            reference.rlhf_advantages(**double(x), kl_coef=0.2, min_std=floor),
        )


@pytest.mark.parametrize("numba", [True, False])
def test_min_std_below_the_spread_changes_no_bit(monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(eager, "numba_works", lambda: False)
    x = make()
    plain = TORCH.masked_whiten(x["values"], x["mask"])
    for floor in (0.0, 1e-40, 1e-3, torch.tensor(0.0), torch.tensor(1e-3)):
        assert torch.equal(TORCH.masked_whiten(x["values"], x["mask"], min_std=floor), plain)


@pytest.mark.parametrize("numba", [True, False])
def test_equal_elements_with_min_std_are_zero_without_eps(monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(eager, "numba_works", lambda: False)
    for floor in (0.1, torch.tensor(0.1)):
        assert not TORCH.masked_whiten(torch.full((5,), 3.0), eps=0.0, min_std=floor).any()


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("floor", [0.5, 30.0])
def test_a_min_std_that_stays_on_the_device_gives_the_same(floor):
    x = make()
    for given in (torch.tensor(floor), torch.tensor(floor, dtype=torch.float64)):
        actual = TORCH.masked_whiten(x["values"], x["mask"], min_std=given)
        close((actual,), (reference.masked_whiten(x["values"].double(), x["mask"], min_std=floor),))
        actual = TORCH.rlhf_advantages(**x, min_std=given)
        close(actual, reference.rlhf_advantages(**double(x), min_std=floor))


@pytest.mark.parametrize("counted", [0, 1])
def test_whitening_does_not_scale_one_element_or_none(counted):
    x, mask = torch.tensor([3.0, 5.0]), torch.tensor([counted == 1, False])
    assert TORCH.masked_whiten(x, mask).tolist() == [0.0, 0.0]
    assert TORCH.masked_whiten(x, mask, shift_mean=False).tolist() == [3.0 * counted, 0.0]


def test_whitening_keeps_its_digits_where_the_mean_is_large():
    """Sums of squares in fp32 would lose the variance of 10000 + noise."""
    x = 1e4 + torch.randn(4000)
    truth = reference.masked_whiten(x.double())
    assert (TORCH.masked_whiten(x).double() - truth).abs().max() < 2e-3


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
def test_rlhf_advantages_match_the_reference(whiten, reward_at):
    x = make()
    if reward_at == "after_last":  # the slot behind the answer has a value of its own
        x["values"] = torch.where(x["mask"], x["values"], 0.25)
    options = dict(gamma=0.9, lam=0.8, kl_coef=0.2, whiten=whiten, reward_at=reward_at, bootstrap=torch.ones(5))
    truth_options = options | {"bootstrap": torch.ones(5).double()}
    close(TORCH.rlhf_advantages(**x, **options), reference.rlhf_advantages(**double(x), **truth_options))


CRITIC_LAMS = {
    "1": 1.0,
    "0": 0.0,
    "in a tensor": torch.tensor(0.7),
    "of rows": torch.linspace(0, 1, 5),
    "of rows in fp64": torch.linspace(0, 1, 5).double(),
}


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
@pytest.mark.parametrize("kind", CRITIC_LAMS)
def test_returns_have_a_lambda_of_their_own(monkeypatch, numba, reward_at, kind):
    if not numba:
        monkeypatch.setattr(eager, "numba_works", lambda: False)
        monkeypatch.setattr(gae_eager, "numba_works", lambda: False)
    x = make()
    if reward_at == "after_last":
        x["values"] = torch.where(x["mask"], x["values"], 0.25)
    for lam, gamma in ((0.8, 0.9), (torch.rand(5), torch.rand(5)), (1.0, 1)):
        options = dict(gamma=gamma, lam=lam, kl_coef=0.2, critic_lam=CRITIC_LAMS[kind], reward_at=reward_at)
        actual = TORCH.rlhf_advantages(**x, **options, bootstrap=torch.ones(5))
        close(actual, reference.rlhf_advantages(**double(x), **double(options), bootstrap=torch.ones(5).double()))
        del options["critic_lam"]
        one = TORCH.rlhf_advantages(**x, **options, bootstrap=torch.ones(5))
        torch.testing.assert_close(actual.advantages, one.advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 63), (9, 1000), (0, 5), (5, 0), (600, 1000)])
def test_two_equal_lambdas_are_one(monkeypatch, numba, shape):
    """The last shape is worth a second thread."""
    if not numba:
        monkeypatch.setattr(eager, "numba_works", lambda: False)
        monkeypatch.setattr(gae_eager, "numba_works", lambda: False)
    values, mask, scores = torch.randn(shape), torch.rand(shape) < 0.7, torch.randn(shape[0])
    arguments = scores, 0 * values, 0 * values, values, mask
    two = TORCH.rlhf_advantages(*arguments, gamma=0.9, lam=0.8, critic_lam=0.8)
    one = TORCH.rlhf_advantages(*arguments, gamma=0.9, lam=0.8)
    for a, b in zip(two[:4], one[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_lambdas_take_other_dtypes_and_views(dtype):
    x = make()
    x = {k: t.to(dtype) if t.is_floating_point() else t for k, t in x.items()}
    views = {k: t.T.contiguous().T if t.ndim == 2 else t for k, t in x.items()}
    actual = TORCH.rlhf_advantages(**views, lam=0.9, critic_lam=0.5)
    assert actual.returns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(actual, reference.rlhf_advantages(**double(x), lam=0.9, critic_lam=0.5))


def test_two_lambdas_take_one_call_of_a_compiled_loop(monkeypatch):
    calls = []
    loop = gae_cpu._compiled_two_lambdas(False)
    counted = (lambda *arguments: calls.append(1) or loop[0](*arguments)), loop[1]
    monkeypatch.setattr(gae_cpu, "_compiled_two_lambdas", lambda double: counted)
    monkeypatch.setattr(gae_cpu, "gae", lambda *arguments: pytest.fail("a pass of one lambda"))
    TORCH.rlhf_advantages(**make(), lam=0.9, critic_lam=1.0)
    assert len(calls) == 1


WORKER = """
import sys, torch, torch.distributed as dist
import ppo_fast as ppo
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
x, mask = 100 + torch.randn(7, 5), torch.rand(7, 5) < 0.7
mine = slice(0, 2) if rank == 0 else slice(2, 7)
whole = ppo.masked_whiten(x, mask)
part = ppo.masked_whiten(x[mine], mask[mine], group=dist.group.WORLD)
assert (part - whole[mine]).abs().max() < 1e-5, (part - whole[mine]).abs().max()
for floor in (20.0, torch.tensor(20.0)):
    part = ppo.masked_whiten(x[mine], mask[mine], group=dist.group.WORLD, min_std=floor)
    assert (part - ppo.masked_whiten(x, mask, min_std=20.0)[mine]).abs().max() < 1e-6
alone = ppo.masked_whiten(x[mine], mask[mine])
assert (alone - whole[mine]).abs().max() > 1e-3, "the split makes no difference, so nothing is shown"
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_whiten_as_one(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
