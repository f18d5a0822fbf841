"""The compiled loops of shape_rewards, masked_whiten and rlhf_advantages: the numbers of PyTorch's operations."""

import pytest
import torch
from support.backends import TORCH
from torch import Tensor

pytest.importorskip("numba", reason='numba is not installed: pip install "ppo_fast[cpu]"')

from ppo_fast.kernels import reference
from ppo_fast.kernels.advantages import cpu, eager

pytestmark = pytest.mark.usefixtures("nan_empty")


def make(B: int, T: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + T)
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[0] = False
    mask[-1, -1] = True
    x = {k: torch.where(mask, torch.randn(B, T, generator=g), torch.nan) for k in ("logprobs", "ref_logprobs")}
    scores = 3 * torch.randn(B, generator=g)
    scores[0] = torch.nan  # a row without a counted token has no score
    return {"scores": scores, **x, "mask": mask}


def by_torch(monkeypatch, function, *args, **options):
    """The same call without the loops."""
    with monkeypatch.context() as patch:
        patch.setattr(eager, "numba_works", lambda: False)
        return function(*args, **options)


def seen(monkeypatch) -> list[str]:
    """Note which loops run."""
    names: list[str] = []
    compiled = cpu._compiled
    monkeypatch.setattr(cpu, "_compiled", lambda name: names.append(name) or compiled(name))
    return names


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (5, 130), (3, 70_000)])
@pytest.mark.parametrize("kl_estimator", reference.KL_ESTIMATORS)
@pytest.mark.parametrize("reward_at", reference.REWARD_POSITIONS)
@pytest.mark.parametrize("score_clip", [None, 0.5])
def test_rewards_by_loops_match_those_by_operations(monkeypatch, shape, kl_estimator, reward_at, score_clip):
    names, x = seen(monkeypatch), make(*shape)
    options = dict(kl_coef=0.3, kl_estimator=kl_estimator, score_clip=score_clip, reward_at=reward_at)
    got = TORCH.shape_rewards(**x, **options)
    assert names == ["shape"]
    expected = by_torch(monkeypatch, TORCH.shape_rewards, **x, **options)
    assert names == ["shape"]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the same operations; exp may differ in the last place


def test_token_scores_by_loops_match_those_by_operations(monkeypatch):
    x = make(4, 33)
    x["scores"] = torch.where(x["mask"], torch.randn(4, 33), torch.nan)
    for clip in (None, 0.2):
        got = TORCH.shape_rewards(**x, score_clip=clip)
        expected = by_torch(monkeypatch, TORCH.shape_rewards, **x, score_clip=clip)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [{}, {"shift_mean": False}, {"unbiased": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 1000, 65_536, 200_001])
def test_whitening_by_loops_matches_the_reference(monkeypatch, masked, options, size):
    names = seen(monkeypatch)
    x, mask = 100 + torch.randn(size), torch.rand(size) < 0.8
    mask[0] = True
    mask = mask if masked else None
    got = TORCH.masked_whiten(torch.where(mask, x, torch.nan) if masked else x, mask, **options)
    assert set(names) == {"moments", "scale"}
    truth = reference.masked_whiten(x.double(), mask, **options)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-6 if options.get("shift_mean", True) else 1e-4)


def test_whitening_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpu, "_PER_THREAD", 1000)
    x = torch.randn(300_001)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(TORCH.masked_whiten(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [3.0, torch.nan, torch.inf])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_whitening_by_loops_gives_nan_where_operations_do(monkeypatch, value, eps):
    """Constant numbers without eps give NaN, and so do NaN and infinity: nothing is made up."""
    x = torch.full((5,), value)
    got = TORCH.masked_whiten(x, eps=eps)
    expected = by_torch(monkeypatch, TORCH.masked_whiten, x, eps=eps)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("reward_at", "by_token"), [("last", False), ("last", True), ("after_last", False)])
@pytest.mark.parametrize("shape", [(3, 7), (4, 40_000), (64, 17_000)])  # the last is worth a second thread
def test_statistics_by_loops_match_those_by_operations(monkeypatch, reward_at, shape, by_token, whiten):
    names, x = seen(monkeypatch), make(*shape)
    x["values"] = torch.randn(*shape)
    if by_token:
        x["scores"] = torch.where(x["mask"], torch.randn(*shape), torch.nan)
    if reward_at == "last":  # else the slot behind the last counted one has a value that counts
        x["values"] = torch.where(x["mask"], x["values"], torch.nan)
    x |= {"reward_at": reward_at, "kl_estimator": "k3", "score_clip": 0.5, "whiten": whiten}
    got = TORCH.rlhf_advantages(**x)
    assert {"shape", "moments", "scale in place" if whiten else "scale", "sum"} == set(names)
    expected = by_torch(monkeypatch, TORCH.rlhf_advantages, **x)
    for a, b in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the operations sum in fp32
    assert set(got[4]) == set(expected[4])
    for name, value in got[4].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[4][name], rtol=1e-4, atol=1e-5)


def test_the_bits_of_statistics_do_not_depend_on_the_number_of_threads():
    x, before = make(64, 17_000), torch.get_num_threads()
    x["values"] = torch.where(x["mask"], torch.randn(64, 17_000), 0)
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(TORCH.rlhf_advantages(**x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip([*results[0][:4], *results[0][4].values()], [*other[:4], *other[4].values()], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_the_loops_support_contiguous_fp32_tensors_readable_by_address():
    x, mask = torch.randn(4, 6), torch.ones(4, 6, dtype=torch.bool)
    assert cpu.supports(x, mask, None)
    for other in (x.T, x[:, ::2], x.double(), x.half(), x[:0], x.to("meta"), torch._neg_view(x)):
        assert not cpu.supports(other)


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("size", [0, 20, 0.5])
def test_a_damaged_cache_of_numba_is_not_read(monkeypatch, tmp_path, kind, size):
    """As a full disk leaves it."""
    import numba

    config = numba.config
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def total() -> float:
        x, out = torch.arange(5.0), torch.zeros(1, dtype=torch.float64)
        cpu._compiled.__wrapped__("sum")[0](x.data_ptr(), out.data_ptr(), 5)
        return out.item()

    assert total() == 10
    (file,) = tmp_path.rglob(kind)
    content = file.read_bytes()
    file.write_bytes(content[: size if isinstance(size, int) else len(content) // 2])
    assert total() == 10
