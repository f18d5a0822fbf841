"""linear_ppo_loss and linear_logprobs of both backends against fp64: values, gradients, options, hostile numbers."""

import math
from typing import Any

import pytest
import torch
from support.accuracy import assert_error_at_most_twice_eager
from support.backends import BACKENDS, TORCH, TRITON
from support.backends import values_unread as values_unread_fixture
from support.linear_cases import BASIC, make
from torch import Tensor

from ppo_fast.kernels import reference
from ppo_fast.kernels.linear import custom_op
from ppo_fast.kernels.linear.options import HeadOptions

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, about lanes that are not stored
]

values_unread = values_unread_fixture
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PER_TOKEN = ("tokens", "old_logprobs", "advantages", "mask", "ref_logprobs", "weights")
INF, NAN = math.inf, math.nan


@pytest.fixture(params=list(BACKENDS))
def kernels(request: pytest.FixtureRequest):
    return BACKENDS[request.param]


@pytest.fixture(params=[*DTYPES, torch.bfloat16], ids=str)
def low_or_not(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def ppo(function, x: dict[str, Any], dtype: torch.dtype, upstream: float = 1.7, **options) -> dict[str, Tensor]:
    """Everything that linear_ppo_loss returns, and the gradients of loss * upstream."""
    wide = torch.promote_types(dtype, torch.float32)
    head = {name: x[name].to(dtype).detach().requires_grad_() for name in ("hidden", "weight", "bias") if name in x}
    rest = {name: value for name, value in x.items() if name not in head and name not in ("mask", "tokens")}
    rest = {name: v.to(wide) if isinstance(v, Tensor) else v for name, v in rest.items()}
    hidden, weight = head.pop("hidden"), head.pop("weight")
    positional = x["tokens"], rest.pop("old_logprobs"), rest.pop("advantages"), x.get("mask")
    loss, stats, logprobs, entropy = function(hidden, weight, *positional, **head, **rest, **options)
    assert not any(value.requires_grad for value in (*stats.values(), logprobs, entropy))
    (loss * upstream).backward()
    gradients = {f"d {name}": t.grad for name, t in {"hidden": hidden, "weight": weight, **head}.items()}
    out = {"loss": loss.detach(), "logprobs": logprobs, "entropy": entropy, **stats, **gradients}
    if function is not reference.linear_ppo_loss:
        assert all(out[name].dtype == wide for name in ("loss", "logprobs", "entropy"))
    assert all(value.dtype == dtype for value in gradients.values())
    return out


def check_ppo(kernels, x: dict[str, Any], dtype: torch.dtype = torch.float32, own: Any = None, **options) -> None:
    """Against fp64 on the same rounded inputs; `own` are options that the reference does not have."""
    rounded = {n: v.to(dtype) if n in ("hidden", "weight", "bias") else v for n, v in x.items()}
    actual = ppo(kernels.linear_ppo_loss, rounded, dtype, **options, **(own or {}))
    eager = ppo(reference.linear_ppo_loss, rounded, dtype, **options)
    truth = ppo(reference.linear_ppo_loss, rounded, torch.float64, **options)
    assert actual.keys() == truth.keys()
    for name, t in truth.items():
        # logp is about -16, where an ulp is 1e-6, and so is then a ratio's relative error.
        assert_error_at_most_twice_eager(actual[name], eager[name], t, slack=3e-6, name=name)


OPTIONS = {
    "plain": ((), {}),
    "mask": (("mask",), {}),
    "bias": (("bias",), {}),
    "softcap": ((), {"softcap": 3.0}),
    "softcap and bias": (("bias", "mask"), {"softcap": 3.0, "temperature": 1.3, "logit_scale": 0.5}),
    "scale and temperature": ((), {"temperature": 0.7, "logit_scale": 1.3}),
    "entropy bonus": (("mask",), {"entropy_coef": 0.1}),
    "entropy bonus, softcap": (("bias",), {"entropy_coef": 0.1, "softcap": 3.0, "temperature": 0.7}),
    "k1": (("ref_logprobs",), {"kl_coef": 0.3, "kl_estimator": "k1"}),
    "k2": (("ref_logprobs",), {"kl_coef": 0.3, "kl_estimator": "k2"}),
    "k3": (("ref_logprobs", "mask"), {"kl_coef": 0.3, "kl_estimator": "k3"}),
    "abs": (("ref_logprobs",), {"kl_coef": 0.3, "kl_estimator": "abs", "entropy_coef": 0.01}),
    "reference without penalty": (("ref_logprobs",), {}),
    "dual clip and weights": (("weights", "mask"), {"dual_clip": 1.1, "clip_low": 0.1, "clip_high": 0.3}),
    "clamped ratios": ((), {"log_ratio_clamp": 0.2}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_their_gradients_match_the_reference(kernels, device, name):
    tensors, options = OPTIONS[name]
    everything = make(2, 5, V=133, device=device)
    check_ppo(kernels, {n: everything[n] for n in (*BASIC, *tensors)}, **options)


@pytest.mark.parametrize("aggregation", reference.AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 5.0, "tensor"])
def test_aggregations_weight_terms_as_the_reference(kernels, device, aggregation, denominator):
    if denominator is not None and aggregation == "token-sum":
        pytest.skip("token-sum divides by nothing")
    x = make(3, 4, V=33, device=device)
    x["mask"][1] = False
    x["mask"][2] = torch.arange(4, device=device) == 2
    given = torch.tensor(5.0, device=device) if denominator == "tensor" else denominator
    options = {"norm_length": 11.0} if aggregation.endswith("norm") else {}
    options |= {"aggregation": aggregation, "denominator": given, "entropy_coef": 0.1}
    check_ppo(kernels, {n: x[n] for n in (*BASIC, "mask")}, **options)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_packed_sequences_are_weighted_by_their_lengths(kernels, device, aggregation):
    x = make(12, V=33, device=device)
    options = {"aggregation": aggregation, "cu_seqlens": torch.tensor([0, 3, 3, 8, 12], device=device)}
    check_ppo(kernels, {n: x[n] for n in (*BASIC, "mask")}, **options)
    check_ppo(kernels, {n: x[n] for n in BASIC}, **options)


@pytest.mark.parametrize("V", [1, 2, 129, 2048, 8192, 8195])
def test_vocabularies_of_every_size_match_the_reference(kernels, device, V):
    x = make(5, V=V, device=device)
    check_ppo(kernels, {n: x[n] for n in BASIC})
    check_ppo(kernels, {n: x[n] for n in (*BASIC, "bias")}, entropy_coef=0.1)


def test_low_precision_inputs_err_at_most_as_eager_pytorch(kernels, device, low_or_not):
    """Root mean square errors of the gradients at most 1.2 times those of eager PyTorch, and logp exact to fp32."""
    x = make(32, V=300, D=32, device=device)
    x = {n: x[n].to(low_or_not) if n in ("hidden", "weight") else x[n] for n in BASIC}
    actual = ppo(kernels.linear_ppo_loss, x, low_or_not)
    eager = ppo(reference.linear_ppo_loss, x, low_or_not)
    truth = ppo(reference.linear_ppo_loss, x, torch.float64)

    def error(of: dict[str, Tensor], name: str) -> float:
        return (of[name].double() - truth[name]).square().mean().sqrt().item()

    largest_logit = (x["hidden"].double() @ x["weight"].double().T).abs().max().item()
    assert (actual["logprobs"] - truth["logprobs"]).abs().max() <= 1e-6 * largest_logit
    for name in ("d hidden", "d weight"):
        assert error(actual, name) <= 1.2 * error(eager, name) + 1e-9


def test_logits_dtype_rounds_the_logits(kernels, device):
    """As rollout engines do: the product rounded to the model's dtype, everything after it in fp32."""
    x = make(8, V=200, device=device)
    hidden, weight = x["hidden"].half(), x["weight"].half()
    rounded = reference.token_logprobs((hidden.double() @ weight.double().T).half().double(), x["tokens"])
    logprobs = kernels.linear_logprobs(hidden, weight, x["tokens"], logits_dtype=torch.float16)
    torch.testing.assert_close(logprobs.double(), rounded, rtol=0, atol=3e-6)
    assert (kernels.linear_logprobs(hidden, weight, x["tokens"]) - rounded).abs().max() > 1e-4


def test_a_logits_dtype_that_no_product_writes_is_rejected(kernels, device):
    x = make(3, V=9, device=device)
    with pytest.raises(ValueError, match="logits_dtype must be"):
        kernels.linear_logprobs(x["hidden"].half(), x["weight"].half(), x["tokens"], logits_dtype=torch.bfloat16)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_hidden_and_weight_of_different_dtypes_are_multiplied_in_the_higher_one(kernels, device, weight_dtype):
    x = make(6, V=50, device=device)
    hidden = x["hidden"].to(torch.float16 if weight_dtype == torch.float32 else torch.float32).requires_grad_()
    weight = x["weight"].to(weight_dtype).requires_grad_()
    head = hidden, weight, None, x["tokens"], None, HeadOptions()  # the public operation takes one dtype only
    logprobs = custom_op.linear_logprobs(*head, with_entropy=False, use_triton=kernels is TRITON)
    truth = reference.linear_logprobs(hidden.detach().double(), weight.detach().double(), x["tokens"])
    torch.testing.assert_close(logprobs.double(), truth, rtol=0, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == hidden.dtype
    assert weight.grad.dtype == weight.dtype


def test_tiny_advantages_keep_their_fp16_gradients(kernels, device):
    """1e-6 p is far below what fp16 can hold; with a loss scale of 1e6 the gradients themselves are not."""
    x = {n: v for n, v in make(20, V=500, device=device).items() if n in BASIC}
    x |= {"advantages": x["advantages"] * 1e-6, "hidden": x["hidden"].half(), "weight": x["weight"].half()}
    actual = ppo(kernels.linear_ppo_loss, x, torch.float16, upstream=1e6)
    truth = ppo(reference.linear_ppo_loss, x, torch.float64, upstream=1e6)
    for name in ("d hidden", "d weight"):
        error = (actual[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 2e-3, name  # 4 roundings of 2^-11


def test_two_words_match_the_hand_calculation(kernels, device):
    """z = (0, ln 3), p = (1/4, 3/4), A = 2: loss -2; d loss / d z = -2 (3/4, -3/4); d h = W^T that, d W = that h^T."""
    hidden = torch.tensor([[1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], device=device, requires_grad=True)
    tokens, advantages = torch.tensor([0], device=device), torch.tensor([2.0], device=device)
    loss, stats, logprobs, entropy = kernels.linear_ppo_loss(hidden, weight, tokens, None, advantages)
    loss.backward()
    expected = [-2.0, math.log(1 / 4), math.log(4) - 3 / 4 * math.log(3), 1.5 * math.log(3), -1.5, 1.5, 1.0]
    actual = [loss, logprobs, entropy, hidden.grad, *weight.grad, stats["ratio_mean"]]
    torch.testing.assert_close([a.item() for a in actual], expected, rtol=1e-6, atol=0)


def test_ratios_without_old_logprobs_are_exactly_one(kernels, device):
    x = make(2, 5, V=200, device=device)
    _, stats, *_ = kernels.linear_ppo_loss(x["hidden"], x["weight"], x["tokens"], None, x["advantages"])
    assert (stats["ratio_mean"], stats["ratio_max"], stats["approx_kl"], stats["clip_fraction"]) == (1, 1, 0, 0)
    check_ppo(kernels, {n: x[n] for n in BASIC} | {"old_logprobs": None} | {"mask": x["mask"]})


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_result_does_not_depend_on_chunk_bytes(kernels, device, rows):
    x = {n: v for n, v in make(2, 6, V=150, device=device).items() if n in (*BASIC, "mask", "bias")}
    whole = ppo(kernels.linear_ppo_loss, x, torch.float32, entropy_coef=0.1)
    cut = ppo(kernels.linear_ppo_loss, x, torch.float32, entropy_coef=0.1, chunk_bytes=rows * 160 * 4 * 2 + 5000)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=2e-6, atol=2e-6, msg=name)


def test_micro_batches_add_up_to_the_whole(kernels, device):
    x = make(4, 6, V=70, device=device)
    head = [x[name].requires_grad_() for name in ("hidden", "weight")]
    count = x["mask"].sum().float()

    def loss_of(rows: slice) -> Tensor:
        parts = [x[n][rows] for n in ("tokens", "old_logprobs", "advantages", "mask")]
        return kernels.linear_ppo_loss(head[0][rows], head[1], *parts, denominator=count)[0]

    whole = torch.autograd.grad(loss_of(slice(0, 4)), head)
    parts = torch.autograd.grad(loss_of(slice(0, 1)) + loss_of(slice(1, 4)), head)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_values_at_masked_tokens_reach_no_result(kernels, device, bad):
    x = make(3, 7, V=60, device=device)
    x = {n: x[n] for n in (*BASIC, "mask", "ref_logprobs", "weights")}
    dirty = dict(x)
    for name in ("hidden", "old_logprobs", "advantages", "ref_logprobs", "weights"):
        dirty[name] = torch.where(x["mask"].unsqueeze(-1) if name == "hidden" else x["mask"], x[name], bad)
    dirty["tokens"] = torch.where(x["mask"], x["tokens"], -100)
    options = {"kl_coef": 0.1, "aggregation": "seq-mean-token-mean"}
    clean_out = ppo(kernels.linear_ppo_loss, x, torch.float32, **options)
    for name, value in ppo(kernels.linear_ppo_loss, dirty, torch.float32, **options).items():
        torch.testing.assert_close(value, clean_out[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (2, 5)])
def test_nothing_counted_gives_zero_with_a_graph(kernels, device, shape):
    x = make(*shape, V=30, device=device)
    x["mask"] = torch.zeros_like(x["mask"])
    x = {n: x[n] for n in (*BASIC, "mask", "bias")}
    out = ppo(kernels.linear_ppo_loss, x, torch.float32, aggregation="seq-mean-token-mean", entropy_coef=0.1)
    assert all(bool((value == 0).all()) for value in out.values())
    hidden = x["hidden"].requires_grad_()
    kernels.linear_logprobs(hidden, x["weight"], x["tokens"], x["mask"]).sum().backward()
    assert bool((hidden.grad == 0).all())


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}, {"temperature": 1.3}], ids=str)
@pytest.mark.parametrize("value", [-1e10, -1e20, -1e38, LOWEST])
def test_words_with_a_huge_negative_bias_have_no_probability(kernels, device, value, options):
    """Finite numbers that are used instead of -inf, for a whole block of columns and more."""
    x = make(4, V=2500, device=device)
    x["bias"][:2100] = value
    x["tokens"] = x["tokens"] % 300 + 2150
    if "softcap" in options:  # which lets them through as -softcap
        check_ppo(kernels, {n: x[n] for n in (*BASIC, "bias")}, entropy_coef=0.1, **options)
        return
    dropped = x["bias"].clone()
    x["bias"][:2100] = -INF
    truth = ppo(
        reference.linear_ppo_loss, {n: x[n] for n in (*BASIC, "bias")}, torch.float64, entropy_coef=0.1, **options
    )
    x["bias"] = dropped
    actual = ppo(
        kernels.linear_ppo_loss, {n: x[n] for n in (*BASIC, "bias")}, torch.float32, entropy_coef=0.1, **options
    )
    for name, expected in truth.items():
        torch.testing.assert_close(actual[name].double(), expected.double(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("value", [-1e10, -1e20, -1e38, LOWEST])
def test_equal_huge_logits_are_a_uniform_distribution(kernels, device, value, with_bias):
    """Logits of a product, and of a bias; in more than one block of columns."""
    V, D = 8200, 4
    hidden, weight = torch.zeros(2, D, device=device), torch.zeros(V, D, device=device)
    hidden[:, 0] = 1
    bias = torch.full((V,), value, device=device) if with_bias else None
    weight[:, 0] = 0 if with_bias else value
    hidden.requires_grad_()
    tokens = torch.tensor([0, V - 1], device=device)
    logp, entropy = kernels.linear_logprobs(hidden, weight, tokens, bias=bias, with_entropy=True)
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(V)))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(V)))
    assert torch.autograd.grad(logp.sum() + entropy.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_one_huge_logit_has_all_the_probability(kernels, device, with_bias):
    V, D = 8200, 4
    hidden, weight = torch.zeros(2, D, device=device), torch.zeros(V, D, device=device)
    hidden[:, 0] = 1
    bias = torch.zeros(V, device=device) if with_bias else None
    (weight[:, 0] if bias is None else bias)[11] = 3e38
    tokens = torch.tensor([11, 8199], device=device)
    logp, entropy = kernels.linear_logprobs(hidden, weight, tokens, bias=bias, with_entropy=True)
    torch.testing.assert_close(logp, torch.tensor([0.0, -3e38], device=device))
    assert not entropy.any()


def test_a_word_with_a_bias_of_minus_inf_has_no_probability(kernels, device):
    """A bias of -inf takes a word out of the vocabulary: no probability, no gradient, also behind a softcap."""
    for options in ({}, {"softcap": 5.0}):
        x = make(6, V=40, device=device)
        x["bias"][7] = x["bias"][39] = -INF
        x["tokens"] = torch.where((x["tokens"] == 7) | (x["tokens"] == 39), 0, x["tokens"])
        # of these tokens and options: a ratio of 80 would multiply the last bit of one log-probability by 80
        x["old_logprobs"] = reference.linear_logprobs(x["hidden"], x["weight"], x["tokens"], bias=x["bias"], **options)
        x["old_logprobs"] += 0.3 * x["weights"]
        check_ppo(kernels, {n: x[n] for n in (*BASIC, "bias")}, entropy_coef=0.1, **options)


@pytest.mark.usefixtures("values_unread")
def test_a_token_outside_the_vocabulary_gives_nan(device):
    """On a GPU the tokens are not checked: NaN for the row, the loss and d weight, and no read out of bounds."""
    x = make(4, V=33, device=device)
    for token in (33, -1, 10**12):
        tokens = x["tokens"].clone()
        tokens[1] = token
        hidden, weight = (x[n].detach().requires_grad_() for n in ("hidden", "weight"))
        loss, _, logprobs, _ = TRITON.linear_ppo_loss(hidden, weight, tokens, x["old_logprobs"], x["advantages"])
        loss.backward()
        assert logprobs.isnan().tolist() == [False, True, False, False]
        assert loss.isnan()
        assert weight.grad.isnan().all()
        assert hidden.grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("way", ["transposed", "sliced", "expanded", "offset"])
def test_strides_are_respected(kernels, device, way):
    x = {n: v for n, v in make(4, 6, V=50, device=device).items() if n in (*BASIC, "mask")}

    def view(t: Tensor) -> Tensor:
        if way == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if way == "sliced":
            return torch.stack([t, t], -1)[..., 0]
        if way == "expanded":
            return t[:1].expand(t.shape)
        return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)

    views = {n: view(v) for n, v in x.items()}
    if way == "expanded":
        views["weight"] = x["weight"]
    expected = ppo(kernels.linear_ppo_loss, {n: v.contiguous() for n, v in views.items()}, torch.float32)
    for name, value in ppo(kernels.linear_ppo_loss, views, torch.float32).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


LOGPROB_OPTIONS = {
    "plain": ((), {}),
    "mask": (("mask",), {}),
    "bias": (("bias", "mask"), {}),
    "softcap": (("bias",), {"softcap": 3.0, "temperature": 0.8, "logit_scale": 1.2}),
}


def logprobs_and_gradients(
    function, x: dict[str, Tensor], dtype: torch.dtype, g: Tensor | None, h: Tensor | None, **options
) -> dict[str, Tensor]:
    head = {name: x[name].to(dtype).detach().requires_grad_() for name in ("hidden", "weight", "bias") if name in x}
    args = head["hidden"], head["weight"], x["tokens"], x.get("mask")
    logp, entropy = function(*args, bias=head.get("bias"), with_entropy=True, **options)
    used = [(out, up.to(out)) for out, up in ((logp, g), (entropy, h)) if up is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return {"logp": logp, "entropy": entropy, **{f"d {name}": t.grad for name, t in head.items()}}


@pytest.mark.parametrize("upstream", ["both", "logp", "entropy"])
@pytest.mark.parametrize("name", LOGPROB_OPTIONS)
def test_every_upstream_gradient_of_linear_logprobs_matches_the_reference(kernels, device, name, upstream):
    tensors, options = LOGPROB_OPTIONS[name]
    x = make(2, 4, V=133, device=device)
    x = {n: x[n] for n in ("hidden", "weight", "tokens", *tensors)}
    g, h = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(3)).to(device)
    up = (g if upstream != "entropy" else None), (h if upstream != "logp" else None)
    for dtype, own in ((torch.float32, {"chunk_bytes": 9000}), (torch.float16, {})):
        rounded = {n: v.to(dtype) if v.is_floating_point() else v for n, v in x.items()}
        actual = logprobs_and_gradients(kernels.linear_logprobs, rounded, dtype, *up, **options, **own)
        eager = logprobs_and_gradients(reference.linear_logprobs, rounded, dtype, *up, **options)
        truth = logprobs_and_gradients(reference.linear_logprobs, rounded, torch.float64, *up, **options)
        for key, t in truth.items():
            assert_error_at_most_twice_eager(actual[key], eager[key], t, slack=2e-6, name=f"{key}, {dtype}")


def test_fp64_is_computed_in_fp64(device):
    x = {n: v.double() if v.is_floating_point() else v for n, v in make(3, 5, V=40, device=device).items()}
    options = {"kl_coef": 0.1, "entropy_coef": 0.1, "softcap": 4.0, "aggregation": "seq-mean-token-mean"}
    actual = ppo(TORCH.linear_ppo_loss, x, torch.float64, **options)
    for name, value in ppo(reference.linear_ppo_loss, x, torch.float64, **options).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_compute_dtype_rounds_the_operands_only(kernels, device, stored, compute):
    """Errors against fp64 are at most 1.2 times those of eager PyTorch, which multiplies in that dtype; gradients keep
    the dtypes of hidden states and weight, which may differ."""
    x = make(32, V=300, D=32, device=device)
    hidden, weight = x["hidden"].float().requires_grad_(), x["weight"].to(stored).requires_grad_()
    rest = x["tokens"], None, x["advantages"].float()
    loss, _, logprobs, _ = kernels.linear_ppo_loss(hidden, weight, *rest, entropy_coef=0.1, compute_dtype=compute)
    actual = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in actual] == [torch.float32, stored]
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss, _, exact, _ = reference.linear_ppo_loss(*wide, x["tokens"], None, rest[2].double(), entropy_coef=0.1)
    truth = torch.autograd.grad(loss, wide)
    low = [t.detach().to(compute).requires_grad_() for t in (hidden, weight)]
    logits = reference.linear_logits(*low).float()  # rounded to the dtype, as nn.Linear does
    eager, entropy = reference.token_logprobs(logits, x["tokens"], with_entropy=True)
    ratio = (eager - eager.detach()).exp()
    rounded = torch.autograd.grad(-(ratio * rest[2]).mean() - 0.1 * entropy.mean(), low)
    bound = 1e-6 * logits.abs().max().double()

    def error(x: Tensor, of: Tensor) -> Tensor:
        return (x.double() - of).square().mean().sqrt()

    assert error(logprobs, exact) <= 1.2 * error(eager.detach(), exact) + bound
    for mine, its, true in zip(actual, rounded, truth, strict=True):
        assert error(mine, true) <= 1.2 * error(its, true) + 2e-3 * true.square().mean().sqrt()


def test_a_compute_dtype_that_no_product_has_is_rejected(kernels, device):
    x = make(4, V=9, device=device)
    with pytest.raises(ValueError, match="compute_dtype must be float32, bfloat16 or float16"):
        kernels.linear_logprobs(x["hidden"].double(), x["weight"].double(), x["tokens"], compute_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="one dtype, unless compute_dtype is given"):
        kernels.linear_logprobs(x["hidden"].float(), x["weight"].bfloat16(), x["tokens"])
