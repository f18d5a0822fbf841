"""token_logprobs of both backends against fp64: values, gradients, hostile numbers and hostile tokens."""

import math

import pytest
import torch
from support.backends import BACKENDS, TORCH
from support.backends import values_unread as values_unread_fixture
from support.logprob_cases import check, differentiate, make

from ppo_fast.kernels import reference

values_unread = values_unread_fixture
pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, about lanes that are not stored
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HUGE_DTYPES = [torch.float32, torch.bfloat16]
# A block of columns is 64, 1024 or 4096 wide; rows of 8191 that start off a 16-byte boundary end in a third block.
VOCABULARIES = [1, 2, 64, 65, 127, 129, 1024, 1025, 4096, 4099, 8191, 50257]
INF, NAN = math.inf, math.nan


@pytest.fixture(params=list(BACKENDS))
def token_logprobs(request: pytest.FixtureRequest):
    return BACKENDS[request.param].token_logprobs


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary_size_and_dtype_is_as_exact_as_eager(token_logprobs, device, V, dtype):
    logits, tokens = make((2, 3, V), device)
    mask = torch.tensor([[True, False, True], [True, True, False]], device=device)
    check(token_logprobs, logits.to(dtype), tokens, mask, temperature=0.7)
    check(token_logprobs, logits.to(dtype), tokens)


def test_a_vocabulary_of_262144_is_as_exact_as_eager(token_logprobs, device):
    """Megatron-LM #2206 asks about numerics beyond 250k."""
    logits, tokens = make((1, 262144), device)
    check(token_logprobs, logits, tokens, temperature=0.7)


def test_two_logits_match_the_hand_calculation(token_logprobs, device):
    """z = (0, ln 3): p = (1/4, 3/4), H = ln 4 - (3/4) ln 3; d logp_0 = (3/4, -3/4); d H = p (H + log p) negated."""
    logits = torch.tensor([[0.0, math.log(3)]], device=device)
    tokens, one = torch.tensor([0], device=device), torch.ones(1, device=device)
    logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=one)
    h = math.log(4) - 0.75 * math.log(3)
    torch.testing.assert_close(logp.cpu(), torch.tensor([-math.log(4)]))
    torch.testing.assert_close(entropy.cpu(), torch.tensor([h]))
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0.75, -0.75]]))
    *_, grad = differentiate(token_logprobs, logits, tokens, h=one)
    expected = torch.tensor([[-0.25 * (h - math.log(4)), -0.75 * (h + math.log(0.75))]])
    torch.testing.assert_close(grad.cpu(), expected)


def test_probabilities_of_all_tokens_add_up_to_one(token_logprobs, device):
    logits, _ = make((1, 129), device)
    every = token_logprobs(logits.expand(129, 129), torch.arange(129, device=device))
    torch.testing.assert_close(every.exp().sum().cpu(), torch.tensor(1.0))


@pytest.mark.parametrize("V", [1, 63, 65, 127, 129, 1025, 4099])
def test_all_negative_rows_match_the_reference(token_logprobs, device, V):
    """verl #2899, #7439, SkyRL #2141: the maximum began at 0, and padded columns added exp(0) each."""
    logits, tokens = make((3, V), device)
    check(token_logprobs, logits - 90, tokens)
    shifted, plain = token_logprobs(logits - 64, tokens), token_logprobs(logits, tokens)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=2e-5)  # x - 64 rounds x to 2^-18


@pytest.mark.parametrize("V", [7, 129, 4099])
def test_entropy_is_finite_when_a_logit_is_minus_inf(token_logprobs, device, V):
    """trl #7221: 0 * -inf, in the value and in the gradient."""
    logits, tokens = make((3, V), device)
    logits[:, ::2] = -INF
    tokens.fill_(1)
    check(token_logprobs, logits, tokens, temperature=1.3)


LOWEST = torch.finfo(torch.float32).min
HUGE = [-1e4, -3e9, -1e10, -1e20, -1e30, -1e38, LOWEST]


def huge(value: float, dtype: torch.dtype) -> float:
    """The value, or the nearest one that the dtype holds."""
    return max(value, torch.finfo(dtype).min)


@pytest.mark.parametrize("value", [*HUGE, -INF])
@pytest.mark.parametrize("columns", [slice(0, 4096), slice(4096, 8192), slice(8192, 9000), slice(1, 9000)])
def test_a_masked_block_of_the_vocabulary_has_no_probability(token_logprobs, device, columns, value):
    """-inf, or a finite number used instead, where log2(e) x overflows, or a product of 1e10 has a residual of 512."""
    logits, _ = make((2, 9000), device)
    logits[:, columns] = value
    check(token_logprobs, logits, logits.argmax(-1))


@pytest.mark.parametrize("dtype", HUGE_DTYPES, ids=str)
@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("V", [50, 1000, 4500])
def test_equal_huge_logits_are_a_uniform_distribution(token_logprobs, device, value, V, dtype):
    logits = torch.full((2, V), huge(value, dtype), dtype=dtype, device=device)
    tokens = torch.tensor([0, V - 1], device=device)
    for temperature in (1.0, 0.7):
        g, h = torch.ones(2, device=device), torch.ones(2, device=device)
        logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=g, h=h, temperature=temperature)
        torch.testing.assert_close(logp, torch.full_like(logp, -math.log(V)))
        torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(V)))
        expected = (torch.nn.functional.one_hot(tokens, V) - 1 / V) / temperature
        torch.testing.assert_close(
            grad.float(), expected.float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0
        )


@pytest.mark.parametrize("dtype", HUGE_DTYPES, ids=str)
@pytest.mark.parametrize("others", [0.0, -1e10, LOWEST])
@pytest.mark.parametrize("V", [50, 4500])
def test_one_huge_logit_has_all_the_probability(token_logprobs, device, V, others, dtype):
    logits, tokens = make((2, V), device)
    logits, tokens = (logits + huge(others, dtype)).clamp(min=torch.finfo(dtype).min).to(dtype), tokens.fill_(V - 7)
    top = huge(3e38, dtype) if dtype != torch.float16 else 6e4
    logits[0, 11] = logits[1, V - 7] = top
    g = torch.ones(2, device=device)
    logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    difference = logits[0, V - 7].double() - logits[0, 11].double()
    torch.testing.assert_close(logp, torch.stack([difference.float(), torch.zeros_like(difference).float()]))
    assert not entropy.any()
    expected = torch.zeros_like(grad)
    expected[0, V - 7], expected[0, 11] = 1, -1
    assert torch.equal(grad, expected)


def test_minus_inf_at_the_target_gives_minus_inf_and_a_finite_gradient(token_logprobs, device):
    logits, tokens = make((3, 129), device)
    logits[torch.arange(3), tokens] = -INF
    g = torch.ones(3, device=device)
    logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    assert torch.equal(logp, torch.full_like(logp, -INF))
    assert entropy.isfinite().all()
    assert grad.isfinite().all()
    truth = differentiate(reference.token_logprobs, logits.double(), tokens, h=g.double())[2]
    truth = truth + torch.nn.functional.one_hot(tokens, 129) - logits.double().softmax(-1)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
def test_nan_or_inf_makes_its_own_row_nan_only(token_logprobs, device, bad):
    """torch.log_softmax makes the whole row NaN; so do we, values and gradients, and no other row is touched."""
    logits, tokens = make((3, 129), device)
    if bad == "all -inf":
        logits[1] = -INF
    else:
        logits[1, 100] = bad
    g = torch.ones(3, device=device)
    logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    assert logits.log_softmax(-1)[1].isnan().all()
    for x in (logp, entropy, grad):
        assert x[1].isnan().all()
        assert x[::2].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_logits_of_ten_thousand_do_not_overflow(token_logprobs, device, temperature, offset):
    logits, tokens = make((4, 1025), device)
    logits[0] *= 3000
    check(token_logprobs, logits + offset, tokens, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_target_probability_near_one_keeps_digits_in_the_gradient(token_logprobs, device, dtype):
    """Liger recomputes it for bf16: p rounded to the logits' dtype before p - 1 keeps no digit at 1 - p = 1e-4."""
    logits, tokens = torch.zeros(1, 33, device=device, dtype=dtype), torch.zeros(1, dtype=torch.int64, device=device)
    logits[0, 0] = math.log(32 / 1e-4)
    expected = 1 - logits.double().softmax(-1)[0, 0].item()
    grad = differentiate(token_logprobs, logits, tokens, g=torch.ones(1, device=device))[2]
    # s = 1 + 1e-4 is a sum in fp32: some roundings to 2^-24, each 6e-4 of the result. fp16 adds 3e-4.
    assert grad[0, 0].item() == pytest.approx(expected, rel=1e-2)


def test_temperature_divides_the_logits_of_logprobs_and_entropy(token_logprobs, device):
    """OpenRLHF #1319, trl #3169."""
    logits, tokens = make((3, 129), device)
    for hot, cold in zip(
        token_logprobs(logits, tokens, temperature=2.5, with_entropy=True),
        token_logprobs(logits / 2.5, tokens, with_entropy=True),
        strict=True,
    ):
        torch.testing.assert_close(hot, cold)


def test_every_token_gets_its_own_upstream_gradient(token_logprobs, device):
    """Liger #1298, #680. Expanded and transposed upstream gradients too."""
    logits, tokens = make((2, 3, 5), device)
    g = torch.arange(1.0, 7.0, device=device).view(2, 3)
    grad = differentiate(token_logprobs, logits, tokens, g=g)[2]
    unit = differentiate(token_logprobs, logits, tokens, g=torch.ones_like(g))[2]
    torch.testing.assert_close(grad, unit * g.unsqueeze(-1))
    strided = g.t().contiguous().t()
    assert torch.equal(differentiate(token_logprobs, logits, tokens, g=strided)[2], grad)
    constant = torch.tensor(1.0, device=device).expand(2, 3)
    assert torch.equal(differentiate(token_logprobs, logits, tokens, g=constant)[2], unit)


def test_a_lazily_negated_upstream_gradient_keeps_its_sign(token_logprobs, device):
    logits, tokens = make((3, 5), device)
    g = torch.arange(1.0, 4.0, device=device)
    negated = torch.complex(g, -g).conj().imag  # memory holds -g
    assert negated.is_neg()
    expected = differentiate(token_logprobs, logits, tokens, g=g)[2]
    assert torch.equal(differentiate(token_logprobs, logits, tokens, g=negated)[2], expected)


@pytest.mark.parametrize("V", [5, 129, 4099])
def test_the_gradients_of_both_outputs_are_independent(token_logprobs, device, V):
    logits, tokens = make((3, V), device)
    g, h = (torch.randn(3, device=device) for _ in range(2))
    both = differentiate(token_logprobs, logits, tokens, g=g, h=h)[2]
    only_g = differentiate(token_logprobs, logits, tokens, g=g)[2]
    only_h = differentiate(token_logprobs, logits, tokens, h=h)[2]
    torch.testing.assert_close(only_g + only_h, both, rtol=1e-5, atol=1e-6)
    x = logits.clone().requires_grad_()
    alone = token_logprobs(x, tokens)
    torch.testing.assert_close(torch.autograd.grad(alone, x, g)[0], only_g, rtol=1e-5, atol=1e-6)
    with_entropy = token_logprobs(logits, tokens, with_entropy=True)[0]
    torch.testing.assert_close(alone.detach(), with_entropy)


def test_values_at_masked_positions_reach_no_result(token_logprobs, device):
    """NaN logits, tokens of -100 and 10^15, and NaN upstream: masked rows give 0 and a gradient of 0."""
    logits, tokens = make((4, 129), device)
    mask = torch.tensor([True, False, True, False], device=device)
    g = torch.ones(4, device=device)
    clean = differentiate(token_logprobs, logits, tokens, mask, g=g, h=g)
    logits[~mask], g[~mask] = NAN, NAN
    tokens[1], tokens[3] = -100, 10**15
    dirty = differentiate(token_logprobs, logits, tokens, mask, g=g, h=g)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


@pytest.mark.usefixtures("values_unread")
@pytest.mark.parametrize("bad", [-1, 129, -(2**40), 2**32 + 5, 10**15])
def test_a_token_outside_the_vocabulary_makes_its_row_nan(token_logprobs, device, bad):
    logits, tokens = make((3, 129), device)
    g = torch.ones(3, device=device)
    clean = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    tokens[1] = bad
    logp, entropy, grad = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    assert logp[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(entropy, clean[1])
    assert torch.equal(logp[::2], clean[0][::2])
    assert torch.equal(grad[::2], clean[2][::2])


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (7,), (1, 1, 7)])
def test_an_empty_batch_and_a_single_row_have_the_right_shape(token_logprobs, device, shape):
    logits, tokens = make(shape, device)
    check(token_logprobs, logits, tokens)


def test_everything_masked_gives_zero_with_a_zero_gradient(token_logprobs, device):
    logits, tokens = make((3, 129), device)
    nothing, g = torch.zeros(3, dtype=torch.bool, device=device), torch.ones(3, device=device)
    for x in differentiate(token_logprobs, logits * NAN, tokens, nothing, g=g, h=g):
        assert (x == 0).all()


def test_double_backward_is_an_error(token_logprobs, device):
    logits, tokens = make((3, 129), device)
    logp = token_logprobs(logits.requires_grad_(), tokens)
    with pytest.raises(RuntimeError, match="token_logprobs has no double backward"):
        torch.autograd.grad(logp.sum(), logits, create_graph=True)


def test_the_torch_backend_computes_fp64_logits_in_fp64(device):
    logits, tokens = make((2, 3, 17), device)
    x = logits.double().requires_grad_()
    mask = torch.rand(2, 3, device=device) < 0.7
    for with_entropy in (False, True):
        torch.autograd.gradcheck(
            lambda x, e=with_entropy: TORCH.token_logprobs(x, tokens, mask, temperature=0.7, with_entropy=e), x
        )


@pytest.mark.parametrize("V", [3, 129, 1030, 4099])
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_64(token_logprobs, device, V):
    """Also at other alignments, and with 16-byte loads or not."""
    logits, tokens = make((64, V), device)
    g, h = torch.randn(64, device=device), torch.randn(64, device=device)
    batch = differentiate(token_logprobs, logits, tokens, g=g, h=h)
    padded = torch.zeros(64, V + 1 + V % 2, device=device)[:, 1 : V + 1]
    padded.copy_(logits)
    for i in (0, 31, 63) if V < 1000 else (0, 63):
        row = slice(i, i + 1)
        for alone in (logits[row], logits[row].clone(), padded[row]):
            single = differentiate(token_logprobs, alone, tokens[row], g=g[row], h=h[row])
            for a, b in zip(single, batch, strict=True):
                assert torch.equal(a, b[row])


def test_repeats_have_equal_bits(token_logprobs, device):
    logits, tokens = make((5, 1030), device)
    g = torch.randn(5, device=device)
    first = differentiate(token_logprobs, logits, tokens, g=g, h=g)
    is_quick = token_logprobs.keywords["backend"] == "torch" or device.type == "cuda"
    for _ in range(100 if is_quick else 5):  # 0.1 s interpreted
        again = differentiate(token_logprobs, logits, tokens, g=g, h=g)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
