"""policy_loss, value_loss and ppo_loss of both backends against the reference in fp64: loss, gradients, statistics."""

import pytest
import torch
from accuracy import assert_error_at_most_twice_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_fast.kernels import eager_loss, loss, reference

pytestmark = pytest.mark.usefixtures("nan_empty")

LEAVES = ("logprobs", "values", "entropy")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest):
    return {"triton": loss, "torch": eager_loss}[request.param]


def make(shape: tuple[int, ...] = (4, 13), seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Everything ppo_loss can take, with NaN wherever the mask says that nothing counts."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < 0.7
    logprobs = -torch.rand(shape, generator=g)
    given = {
        "logprobs": logprobs,
        "values": torch.randn(shape, generator=g),
        "old_logprobs": logprobs + 0.4 * torch.randn(shape, generator=g),
        "old_values": torch.randn(shape, generator=g),
        "advantages": torch.randn(shape, generator=g),
        "returns": torch.randn(shape, generator=g),
        "entropy": torch.rand(shape, generator=g),
        "ref_logprobs": logprobs + 0.4 * torch.randn(shape, generator=g),
        "weights": torch.rand(shape, generator=g),
    }
    return {k: torch.where(mask, x, torch.nan).to(device) for k, x in given.items()} | {"mask": mask.to(device)}


def run(module, tensors: dict[str, Tensor], dtype: torch.dtype, upstream: float = 1.3, **options):
    """Loss, statistics and gradients of one ppo_loss in a dtype."""
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}
    leaves = {k: cast[k].detach().requires_grad_() for k in LEAVES if k in cast}
    value, stats = module.ppo_loss(**{**cast, **leaves}, **options)
    grads = torch.autograd.grad(
        value, list(leaves.values()), torch.tensor(upstream, dtype=value.dtype).to(value.device)
    )
    assert all(not x.requires_grad for x in stats.values())
    return value.detach(), stats, dict(zip(leaves, grads, strict=True))


def check(module, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options) -> None:
    """Every result errs at most twice as much as eager PyTorch in the same dtype, and masked gradients are 0."""
    rounded = {k: x.to(dtype).double() if x.is_floating_point() else x for k, x in tensors.items()}
    truth, eager = run(reference, rounded, torch.float64, **options), run(reference, tensors, dtype, **options)
    actual = run(module, tensors, dtype, **options)
    slack = 3e-7 if dtype == torch.float32 else 2e-3  # one rounding of a gradient that eager may have exact
    assert_error_at_most_twice_eager(actual[0], eager[0], truth[0], slack=1e-6, name="loss")
    assert set(actual[1]) == set(truth[1])
    for name, x in truth[1].items():
        assert_error_at_most_twice_eager(actual[1][name], eager[1][name], x, slack=1e-6, name=name)
    for name, x in truth[2].items():
        assert actual[2][name].dtype == dtype
        assert_error_at_most_twice_eager(actual[2][name], eager[2][name], x, slack=slack, name=f"gradient of {name}")
        assert not actual[2][name][~tensors["mask"]].any()


FULL = dict(dual_clip=1.5, entropy_coef=0.1, kl_coef=0.2, clip_low=0.1, clip_high=0.3, value_coef=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aggregation", reference.AGGREGATIONS)
def test_an_aggregation_is_less_exact_than_eager(backend, aggregation, dtype, device):
    check(backend, make(device=device), dtype, aggregation=aggregation, **FULL)


@pytest.mark.parametrize("kl_estimator", reference.KL_ESTIMATORS)
def test_a_kl_estimator_is_wrong(backend, kl_estimator, device):
    check(backend, make(device=device), kl_estimator=kl_estimator, **FULL)


@pytest.mark.parametrize("aggregation", reference.AGGREGATIONS)
def test_packed_sequences_are_aggregated_wrongly(backend, aggregation, device):
    tensors = make((40,), device=device)
    tensors["mask"][7:12] = False  # a whole sequence without a counted token
    tensors = {k: torch.where(tensors["mask"], x, torch.nan) if k != "mask" else x for k, x in tensors.items()}
    cu_seqlens = torch.tensor([0, 7, 12, 12, 39, 40], device=device)
    norm = {"norm_length": 20.0} if aggregation == "seq-mean-token-sum-norm" else {}
    check(backend, tensors, aggregation=aggregation, cu_seqlens=cu_seqlens, **norm, **FULL)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_denominator_is_ignored(backend, aggregation, device):
    for denominator in (50.0, torch.tensor(50.0, device=device)):
        check(backend, make(device=device), aggregation=aggregation, denominator=denominator, **FULL)


def test_more_tokens_than_one_program_takes_are_summed_wrongly(backend, device):
    check(backend, make((3, 3001), device=device), **FULL)


def test_value_mask_is_confused_with_the_policys(backend, device):
    tensors = make(device=device)
    tensors["values"], tensors["old_values"], tensors["returns"] = torch.randn(3, 4, 13, device=device)
    value_mask = torch.rand(4, 13, device=device) < 0.5
    options = dict(value_mask=value_mask, **FULL)
    truth = run(
        reference, {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}, torch.float64, **options
    )
    actual = run(backend, tensors, torch.float32, **options)
    torch.testing.assert_close(actual[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[2]["values"].double(), truth[2]["values"], rtol=1e-5, atol=1e-6)


def test_clipping_by_hand_is_wrong(backend):
    """ratios 1.5, 0.5, 1.5, 0.5 with A = 1, 1, -1, -1: terms -1.2, -0.5, 1.5, 0.8."""
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    value, stats = backend.policy_loss(logp, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    assert value.item() == pytest.approx(0.6 / 4, abs=1e-6)
    assert stats["clip_fraction"].item() == 0.5
    value.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]) / 4)


def test_at_a_tie_of_the_value_errors_the_gradient_is_not_shared_as_torch_maximum_does(backend):
    """v = 1, old = 0, clip 0.5, R = 0.75: both errors are 0.25; half of v - R comes through."""
    v = torch.tensor([1.0], requires_grad=True)
    backend.value_loss(v, torch.tensor([0.0]), torch.tensor([0.75]), clip=0.5)[0].backward()
    assert v.grad.item() == pytest.approx(0.5 * 0.25)


def test_a_huge_log_ratio_overflows(backend):
    logp = torch.tensor([1e4, -1e4], requires_grad=True)
    value, stats = backend.policy_loss(logp, torch.zeros(2), torch.tensor([-1.0, -1.0]), log_ratio_clamp=20.0)
    value.backward()
    assert value.isfinite()
    assert not logp.grad.any()
    assert all(x.isfinite() for x in stats.values())


def test_nan_where_it_counts_is_hidden(backend):
    for name in ("logprobs", "advantages", "values", "returns"):
        tensors = {k: x.nan_to_num(0.1) if x.is_floating_point() else x for k, x in make().items()}
        tensors["mask"][0, 0] = True
        tensors[name][0, 0] = torch.nan
        assert run(backend, tensors, torch.float32, **FULL)[0].isnan(), name


def test_everything_masked_or_empty_has_no_graph_or_is_not_zero(backend):
    for shape in ((2, 5), (0, 5), (3, 0)):
        x = torch.randn(shape, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool)
        value, stats = backend.ppo_loss(x, x, x.detach(), x.detach(), x.detach(), x.detach(), mask)
        value.backward()
        assert value.item() == 0
        assert not x.grad.any()
        assert all(s.item() == 0 for s in stats.values())


def test_strided_views_are_read_wrongly(backend, device):
    big = {
        k: torch.stack([x.T] * 3, -1)[..., 1].T if x.ndim == 2 else x for k, x in make((4, 13), device=device).items()
    }
    assert not big["logprobs"].is_contiguous()
    check(backend, big, **FULL)
    expanded = make((1, 13), device=device)
    check(backend, {k: x.expand(4, 13) for k, x in expanded.items()}, **FULL)


def test_a_second_backward_differs_from_the_first(backend):
    x = torch.randn(3, 4, requires_grad=True)
    value, _ = backend.policy_loss(x, x.detach() + 0.1, torch.randn(3, 4))
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x, torch.tensor(2.0))
    assert torch.equal(2 * first, second)


def test_double_backward_is_silently_wrong(backend):
    x = torch.randn(3, 4, requires_grad=True)
    value, _ = backend.policy_loss(x, x.detach() + 0.1, torch.randn(3, 4))

    def twice() -> None:
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        grad.sum().backward()

    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        twice()


def test_repeats_differ_in_their_bits(backend, device):
    tensors = make((8, 301), device=device)
    first = run(backend, tensors, torch.float32, **FULL)
    for _ in range(5):
        again = run(backend, tensors, torch.float32, **FULL)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[2][name], again[2][name]) for name in LEAVES)


def test_mixed_dtypes_are_refused_or_wrong(backend):
    tensors = make()
    tensors["logprobs"] = tensors["logprobs"].half()
    truth = reference.ppo_loss(**{k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}, **FULL)[0]
    actual = backend.ppo_loss(**tensors, **FULL)[0]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-6)


def test_fp64_on_the_torch_backend_is_not_fp64():
    tensors = {k: x.double() if x.is_floating_point() else x for k, x in make().items()}
    a, b = run(eager_loss, tensors, torch.float64, **FULL), run(reference, tensors, torch.float64, **FULL)
    torch.testing.assert_close(a[0], b[0], rtol=1e-13, atol=1e-13)
    for name in LEAVES:
        torch.testing.assert_close(a[2][name], b[2][name], rtol=1e-12, atol=1e-14)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    T=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    left_out=st.sets(st.sampled_from(["entropy", "ref_logprobs", "weights"])),
    value_clip=st.sampled_from([None, 0.0, 0.2]),
    dual_clip=st.sampled_from([None, 3.0]),
    aggregation=st.sampled_from(reference.AGGREGATIONS),
)
def test_some_mix_of_options_is_less_exact_than_eager(
    backend, rows, T, seed, left_out, value_clip, dual_clip, aggregation
):
    tensors = {k: x for k, x in make((rows, T), seed).items() if k not in left_out}
    options = dict(value_clip=value_clip, dual_clip=dual_clip, aggregation=aggregation)
    options |= {} if "entropy" in left_out else {"entropy_coef": 0.1}
    options |= {} if "ref_logprobs" in left_out else {"kl_coef": 0.1, "kl_estimator": "k3"}
    check(backend, tensors, **options)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiled_loss_recompiles_for_every_size_or_scalar(name):
    from torch._dynamo.testing import CompileCounter

    import ppo_fast as ppo

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
        return ppo.policy_loss(x, old, advantages, clip_low=clip, clip_high=2 * clip, backend=name).loss

    for i in range(12):
        x, old, advantages = torch.randn(3, 2, 5 + i)
        clip = 0.1 + 0.01 * i
        expected = reference.policy_loss(x, old, advantages, clip_low=clip, clip_high=2 * clip)[0]
        torch.testing.assert_close(compiled(x, old, advantages, clip), expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 3


@pytest.mark.gpu
def test_gpu_repeats_differ_or_cannot_be_captured(device):
    tensors = make((16, 1024), device=device)
    first = run(loss, tensors, torch.float32, **FULL)
    for _ in range(100):
        assert torch.equal(first[0], run(loss, tensors, torch.float32, **FULL)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = loss.ppo_loss(**tensors, **FULL)
    graph.replay()
    assert torch.equal(captured, first[0])
