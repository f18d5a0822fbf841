"""The linear operations: products, memory, waits, compilations, autograd and FSDP."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from support.backends import BACKENDS, TORCH, TRITON, Operations
from support.backends import values_unread as values_unread_fixture
from support.linear_cases import BASIC, make
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.kernels import reference
from ppo_fast.kernels.linear import chunks, eager, launch, steps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, about lanes that are not stored

values_unread = values_unread_fixture


@pytest.fixture(params=list(BACKENDS))
def kernels(request: pytest.FixtureRequest):
    return BACKENDS[request.param]


def inputs(*shape: int, V: int, device: torch.device, **options) -> list[Tensor]:
    """hidden and weight with gradients, tokens, old log-probabilities, advantages."""
    x = make(*shape, V=V, device=device, **options)
    return [x["hidden"].requires_grad_(), x["weight"].requires_grad_(), *(x[n] for n in BASIC[2:])]


class Products(TorchDispatchMode):
    """FLOPs of every matrix product, whatever its overload: in place, out=, with a dtype."""

    ARGUMENTS: ClassVar = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "matmul": (0, 1)}

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.count = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.ARGUMENTS:
            a, b = (args[i] for i in self.ARGUMENTS[name])
            self.flops += 2 * a.numel() * b.shape[-1]
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("trained", "products"), [("hw", 3), ("h", 2), ("w", 2), ("", 1)])
def test_only_the_needed_products_are_computed(kernels, device, dtype, trained, products):
    """FlopCounterMode would miss addmm_ and everything inside an operator; in eager mode there is none."""
    hidden, weight, *rest = inputs(2, 5, V=50, device=device)
    hidden, weight = (x.detach().to(dtype).requires_grad_(n in trained) for n, x in (("h", hidden), ("w", weight)))
    for chunk_bytes in (None, 1):
        with Products() as counted:
            loss = kernels.linear_ppo_loss(hidden, weight, *rest, entropy_coef=0.1, chunk_bytes=chunk_bytes)[0]
            if trained:
                loss.backward()
        assert counted.flops == products * 2 * 10 * 16 * 50
        assert chunk_bytes is None or counted.count > products


@pytest.mark.parametrize("trained", [True, False])
def test_linear_logprobs_computes_the_needed_products_only(kernels, device, trained):
    hidden, weight, tokens, *_ = inputs(2, 5, V=50, device=device)
    with torch.set_grad_enabled(trained), Products() as counted:
        logprobs = kernels.linear_logprobs(hidden, weight, tokens)
        assert counted.flops == 2 * 10 * 16 * 50
        if trained:
            logprobs.sum().backward()
            assert counted.flops == 4 * 2 * 10 * 16 * 50


def test_masked_tokens_are_not_multiplied(kernels, device):
    hidden, weight, *rest = inputs(3, 40, V=50, device=device)
    mask = torch.zeros(3, 40, dtype=torch.bool, device=device)
    mask[1, 35:] = True
    with Products() as counted:
        kernels.linear_ppo_loss(hidden, weight, *rest, mask)[0].backward()
        kernels.linear_logprobs(hidden, weight, rest[0], mask).sum().backward()
    assert counted.flops == (3 + 4) * 2 * 5 * 16 * 50


class Waits(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("values_unread")
def test_the_host_does_not_wait_for_the_device(kernels, device):
    """With num_counted, or without a mask. A CPU checks num_counted, which is what `like_a_gpu` turns off."""
    hidden, weight, *rest = inputs(3, 4, V=50, device=device)
    for options in ({}, {"aggregation": "seq-mean-token-mean", "weights": rest[2], "ref_logprobs": rest[1]}):
        with Waits():
            loss, *_ = kernels.linear_ppo_loss(hidden, weight, *rest, **options)
            (loss * 2).backward()
            kernels.linear_logprobs(hidden, weight, rest[0]).sum().backward()


def test_num_counted_changes_no_result_and_a_wrong_one_is_an_error(kernels, device):
    hidden, weight, *rest = inputs(3, 7, V=50, device=device)
    mask = make(3, 7, V=50, device=device)["mask"]
    n = int(mask.sum())
    expected = kernels.linear_ppo_loss(hidden, weight, *rest, mask)[0]
    assert kernels.linear_ppo_loss(hidden, weight, *rest, mask, num_counted=n)[0] == expected
    if device.type == "cpu":  # elsewhere the loss is NaN instead: the next test
        for wrong in (n - 1, n + 1, 21):
            with pytest.raises(ValueError, match=f"num_counted must be the number of True in mask, {n}; got {wrong}"):
                chunks.counted_rows(mask, wrong, 21)  # in compiled code, whose arguments have no values to check
    with pytest.raises(ValueError, match="num_counted must be 21"):
        chunks.counted_rows(None, 20, 21)


@pytest.mark.usefixtures("programs_may_overlap", "values_unread")
def test_a_wrong_num_counted_on_a_gpu_gives_nan(kernels, device, monkeypatch):
    """No check reads values on a GPU. A CPU without these checks is used instead of one."""

    def like_a_gpu(mask: Tensor, num_counted: int, N: int) -> chunks.Rows:
        index = torch.nonzero_static(mask.reshape(-1), size=num_counted, fill_value=0).squeeze(1)
        return chunks.Rows(index, num_counted, mask.sum() != num_counted)

    hidden, weight, *rest = inputs(3, 7, V=50, device=device)
    mask = make(3, 7, V=50, device=device)["mask"]
    n = int(mask.sum())
    expected = kernels.linear_ppo_loss(hidden, weight, *rest, mask)[0]
    monkeypatch.setattr(steps, "counted_rows", like_a_gpu)
    assert kernels.linear_ppo_loss(hidden, weight, *rest, mask, num_counted=n)[0] == expected
    for wrong in (n - 1, n + 1):
        loss, _, logprobs, _ = kernels.linear_ppo_loss(hidden, weight, *rest, mask, num_counted=wrong)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss.isnan()
        assert logprobs.isnan().all()
        assert all(bool(g.isnan().any()) for g in gradients)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chosen", [None, [0], [5], [0, 1, 2, 3, 4, 5], [1, 2, 5], [0, 3]])
@pytest.mark.parametrize("D", [8, 2056])
def test_gradients_scaled_in_one_launch_have_the_bits_of_torch_operations(device, dtype, chosen, D):
    index = None if chosen is None else torch.tensor(chosen, device=device)
    n = 6 if chosen is None else len(chosen)
    d = chunks.Gradients(*(torch.randn(*s, device=device) for s in ((n, D), (5, D), (5,))))
    shapes = [(torch.Size((2, 3, D)), dtype), (torch.Size((5, D)), dtype), (torch.Size((5,)), dtype)]
    upstream, inverse = torch.tensor(-1.7, device=device), torch.tensor(0.3, device=device)
    for given in (d, d._replace(hidden=None), d._replace(weight=None, bias=None)):
        actual = launch.scale_gradients(given, upstream, inverse, index, shapes)
        expected = steps.scaled_all(given, upstream * inverse, index, shapes)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None and e is None) or (a.dtype == dtype and torch.equal(a, e))
    if index is not None:  # no scale: rows and dtypes alone
        actual = launch.scale_gradients(d, None, None, index, shapes)
        assert all(map(torch.equal, actual, steps.scaled_all(d, None, index, shapes)))


def test_scaled_gradients_are_nan_everywhere_if_their_rows_are_not_those_of_the_mask(device):
    """num_counted was too large: zeros follow the rows, and their order is lost."""
    d = chunks.Gradients(torch.ones(4, 8, device=device), None, None)
    index, nan = torch.tensor([2, 4, 0, 0], device=device), torch.tensor(math.nan, device=device)
    shapes = [(torch.Size((6, 8)), torch.float32), None, None]
    (hidden, *_) = launch.scale_gradients(d, torch.ones((), device=device), nan, index, shapes)
    assert hidden.isnan().all()


def test_unaligned_rows_and_mixed_dtypes_are_scaled_by_torch_operations(device):
    one = torch.ones((), device=device)
    index = torch.tensor([0, 2], device=device)
    for D, other in ((7, torch.float32), (8, torch.bfloat16)):
        d = chunks.Gradients(torch.ones(2, D, device=device), torch.ones(5, D, device=device), None)
        shapes = [(torch.Size((3, D)), torch.float32), (torch.Size((5, D)), other), None]
        assert launch.scale_gradients(d, one, one, index, shapes) is None


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes alive at once of what `run` allocates on the CPU, from the allocator's own events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_memory_stays_within_chunk_bytes(dtype, masked, count):
    """Of the torch backend, beyond inputs, gradients, and with several chunks the fp32 accumulator of d weight."""
    N, D, V = 600, 64, 4000
    x = inputs(N, V=V, D=D, device=torch.device("cpu"))
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in x[:2])
    mask = (torch.arange(N) % 2 == 0) if masked else None
    counted = N // (1 + masked)
    accumulator = V * D * 4
    chunk_bytes = counted * V * 4 // count + (4 << 20) + (0 if dtype == torch.float32 or count > 1 else accumulator)
    results: list[Any] = []

    def forward() -> None:
        results.append(TORCH.linear_ppo_loss(hidden, weight, *x[2:], mask, chunk_bytes=chunk_bytes)[0])

    TORCH.linear_ppo_loss(hidden, weight, *x[2:], mask, chunk_bytes=chunk_bytes)  # whatever is made only once
    in_forward = peak_bytes(forward)
    in_backward = peak_bytes(lambda: results.append(torch.autograd.grad(results[0], (hidden, weight))))
    gradients = (V + N) * D * dtype.itemsize
    extra = accumulator - V * D * dtype.itemsize if count > 1 else 0
    assert in_forward <= gradients + chunk_bytes + extra
    assert in_forward >= counted * V * 4 // count  # the measurement includes the chunk
    assert in_backward <= 2 * gradients + (8 << 20)  # those that are returned, and at most one more d weight


def test_memory_of_linear_logprobs_stays_within_chunk_bytes():
    N, D, V = 600, 64, 4000
    hidden, weight, tokens, *_ = inputs(N, V=V, D=D, device=torch.device("cpu"))
    chunk_bytes = N * V * 4 // 6 + (4 << 20)
    logprobs = TORCH.linear_logprobs(hidden, weight, tokens, chunk_bytes=chunk_bytes)
    in_forward = peak_bytes(lambda: TORCH.linear_logprobs(hidden, weight, tokens, chunk_bytes=chunk_bytes))
    in_backward = peak_bytes(lambda: torch.autograd.grad(logprobs.sum(), (hidden, weight)))
    assert in_forward <= chunk_bytes
    assert in_backward <= chunk_bytes + (V + N) * D * 4


def chunk_rows(N: int, *, dtype: torch.dtype, logits_dtype: torch.dtype, **options) -> int:
    """Rows of a chunk on a GPU for D = 4096, V = 128256; they depend on shapes and dtypes only."""
    hidden = torch.empty(N, 4096, dtype=dtype, device="meta")
    weight = torch.empty(128256, 4096, dtype=dtype, device="meta")
    return chunks.make_plan(
        hidden,
        weight,
        chunks.Rows(None, N, None),
        native=True,
        in_place=False,
        logits_dtype=logits_dtype,
        needs=(True, True, False),
        scratch_bytes=0,
        **{"chunk_bytes": None} | options,
    ).rows


def test_a_gpu_gets_few_large_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "product_path", lambda device, dtype: "widening")
    low, wide = torch.bfloat16, torch.float32
    assert chunk_rows(8192, dtype=low, logits_dtype=low) == 8192  # one chunk takes no more than two and d weight
    assert chunk_rows(8192, dtype=low, logits_dtype=wide) == 4096
    assert chunk_rows(16384, dtype=low, logits_dtype=wide) == 4096
    assert chunk_rows(9000, dtype=low, logits_dtype=wide) == 3000  # three of one size
    assert chunk_rows(100, dtype=low, logits_dtype=wide) == 100
    assert chunk_rows(8192, dtype=low, logits_dtype=wide, chunk_bytes=0) == 1
    budget = 3 << 30
    rows = chunk_rows(8192, dtype=low, logits_dtype=wide, chunk_bytes=budget)
    assert 2048 <= rows <= budget // (128256 * 6)


@pytest.fixture
def without_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ROCm, and with TunableOp: products of fp16 are rounded to fp16."""
    monkeypatch.setattr(chunks, "product_path", lambda device, dtype: "rounded")


@pytest.mark.usefixtures("without_widening")
def test_an_explicit_fp32_of_logits_is_honoured_where_no_product_widens(device):
    x = make(6, V=50, device=device)
    hidden, weight = x["hidden"].half(), x["weight"].half()
    exact = reference.linear_logprobs(hidden.double(), weight.double(), x["tokens"])
    wide = TRITON.linear_logprobs(hidden, weight, x["tokens"], logits_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=2e-6)
    rounded = TRITON.linear_logprobs(hidden, weight, x["tokens"])
    assert 1e-5 < (rounded - exact).abs().max() < 2e-2  # fp16 has 11 bits


@pytest.mark.usefixtures("without_widening")
def test_gradients_match_the_reference_where_no_product_widens(device):
    x = make(40, V=50, device=device)
    hidden, weight = (x[n].half().requires_grad_() for n in ("hidden", "weight"))
    TRITON.linear_logprobs(hidden, weight, x["tokens"], chunk_bytes=1).sum().backward()
    h, w = (x[n].double().requires_grad_() for n in ("hidden", "weight"))
    reference.linear_logprobs(h, w, x["tokens"]).sum().backward()
    for actual, truth in ((hidden, h), (weight, w)):
        assert (actual.grad - truth.grad).norm() < 5e-3 * truth.grad.norm()


@pytest.fixture
def low_products(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """The torch backend with operands in fp16 and bf16, as on ROCm and XPU."""
    monkeypatch.setattr(eager, "EPILOGUE", dataclasses.replace(eager.EPILOGUE, native=lambda device: True))
    return TORCH


@pytest.mark.usefixtures("without_widening")
@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"softcap": 5.0}, {"chunk_bytes": 1}], ids=str)
def test_eager_half_precision_gradients_match_the_reference_where_no_product_widens(
    low_products, device, dtype, share, options
):
    """The chunk itself is in fp16 or bf16 there, so the bound is a few of their roundings."""
    hidden, weight, *rest = inputs(40, V=50, device=device)
    low, wide = ([t.detach().to(d).requires_grad_() for t in (hidden, weight)] for d in (dtype, torch.float64))
    kept = {name: x for name, x in options.items() if name != "chunk_bytes"}
    losses = low_products.linear_ppo_loss(*low, *rest, **options)[0], reference.linear_ppo_loss(*wide, *rest, **kept)[0]
    for actual, truth in zip(gradients(losses[0], *low), gradients(losses[1], *wide), strict=True):
        assert (actual - truth).norm() < share * truth.norm()
    kept.pop("entropy_coef", None)
    functions = low_products.linear_logprobs, reference.linear_logprobs
    sums = [score(*head, rest[0], **kept).sum() for score, head in zip(functions, (low, wide), strict=True)]
    for actual, truth in zip(gradients(sums[0], *low), gradients(sums[1], *wide), strict=True):
        assert (actual - truth).norm() < share * truth.norm()


@pytest.mark.usefixtures("without_widening")
def test_eager_scores_are_finite_in_fp16_when_the_sum_of_exponentials_exceeds_its_range(low_products, device):
    """65504 is the largest number of fp16, and 70000 equal logits have the sum 70000."""
    hidden, weight = (torch.zeros(shape, dtype=torch.float16, device=device) for shape in ((2, 16), (70000, 16)))
    tokens, ones = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, device=device)
    hidden.requires_grad_()
    loss, _, logprobs, _ = low_products.linear_ppo_loss(hidden, weight, tokens, None, ones)
    assert gradients(loss, hidden)[0].isfinite().all()
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(70000)))


def test_the_plan_counts_the_rounded_product_of_d_weight(monkeypatch):
    monkeypatch.setattr(chunks, "product_path", lambda device, dtype: "rounded")
    options = {"dtype": torch.bfloat16, "logits_dtype": None}
    product = 128256 * 4096 * 2
    rows = chunk_rows(8192, chunk_bytes=product + (1 << 30), **options)
    assert 1 < rows <= (1 << 30) // (128256 * 4)
    assert chunk_rows(8192, chunk_bytes=product, **options) == 1


@pytest.mark.parametrize(("capable", "path"), [(True, "mixed"), (False, "converted")])
def test_a_device_without_widening_products_is_detected(monkeypatch, capable, path):
    """A CPU has none, in any form of the call."""
    monkeypatch.setattr(chunks, "cpu_multiplies_bf16", lambda: capable)
    assert not chunks._multiplies_into_fp32(torch.device("cpu"), torch.float16)
    assert chunks.product_path(torch.device("cpu"), torch.bfloat16) == path
    assert chunks.product_path(torch.device("cpu"), torch.float16) == "converted"
    assert chunks.product_path(torch.device("cpu"), torch.float32) == "exact"
    assert chunks.product_path(torch.device("meta"), torch.bfloat16) == "rounded"


class Calls(TorchDispatchMode):
    """Names of the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_backward_fills_no_tensor(kernels, device):
    hidden, weight, *rest = inputs(3, 4, V=50, device=device)
    losses = kernels.linear_ppo_loss(hidden, weight, *rest)[0], kernels.linear_logprobs(hidden, weight, rest[0]).sum()
    upstream = torch.ones((), device=device)
    for loss in losses:
        with Calls() as calls:
            torch.autograd.grad(loss, (hidden, weight), upstream)
        assert not [name for name in calls.names if "zero" in name or "ones" in name]


def test_an_unused_loss_has_no_gradient(kernels, device):
    hidden, weight, *rest = inputs(3, 4, V=50, device=device)
    unused = kernels.linear_ppo_loss(hidden, weight, *rest)[0]
    used = kernels.linear_ppo_loss(hidden, weight, *rest)[0]
    torch.autograd.grad(used + unused.detach(), (hidden, weight))


@pytest.mark.needs_gpu
def test_products_fall_back_with_tunable_op_or_fp16_accumulation(device):
    x = make(6, V=50, D=64, device=device)
    hidden, weight = x["hidden"].half(), x["weight"].half()
    exact = reference.linear_logprobs(hidden.double(), weight.double(), x["tokens"])
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    torch.cuda.tunable.enable(True)
    try:
        logprobs = TRITON.linear_logprobs(hidden, weight, x["tokens"])
    finally:
        torch.cuda.tunable.enable(False)
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=5e-2)


def gradients(loss: Tensor, *of: Tensor, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, **options)


def test_a_second_backward_is_independent_of_the_first(kernels, device):
    hidden, weight, *rest = inputs(2, 5, V=50, device=device)
    losses = [kernels.linear_ppo_loss(hidden, weight, *rest)[0], kernels.linear_logprobs(hidden, weight, rest[0]).sum()]
    for loss in losses:
        once = gradients(loss, hidden, weight, retain_graph=True)
        kept = [g.clone() for g in once]
        twice = gradients(2 * loss, hidden, weight, retain_graph=True)
        again = gradients(loss, hidden, weight)
        for a, b, c, k in zip(once, twice, again, kept, strict=True):
            assert torch.equal(a, k)
            assert torch.equal(b, 2 * k)
            assert torch.equal(c, k)


def test_gradients_add_up_over_calls_and_consumers(kernels, device):
    """Accumulation, a second consumer of hidden, and a weight that is also the embedding."""
    x = make(2, 5, V=50, device=device)

    def gradient(function: Callable, dtype: torch.dtype) -> Tensor:
        weight = x["weight"].to(dtype, copy=True).requires_grad_()
        for _ in range(2):
            hidden = weight[x["tokens"]].tanh()
            loss = function(hidden, weight, x["tokens"], None, x["advantages"].to(dtype))[0] + hidden.square().mean()
            (0.5 * loss).backward()
        return weight.grad

    actual, truth = gradient(kernels.linear_ppo_loss, torch.float32), gradient(reference.linear_ppo_loss, torch.float64)
    torch.testing.assert_close(actual.double(), truth, rtol=3e-6, atol=1e-6)


def test_create_graph_is_an_error(kernels, device):
    hidden, weight, *rest = inputs(2, 5, V=50, device=device)
    for name, loss in (
        ("linear_ppo_loss", kernels.linear_ppo_loss(hidden, weight, *rest)[0]),
        ("linear_logprobs", kernels.linear_logprobs(hidden, weight, rest[0]).sum()),
    ):
        with pytest.raises(RuntimeError, match=f"create_graph=True: {name} has no second derivative"):
            gradients(loss, hidden, weight, create_graph=True)


def test_autocast_does_not_cast_the_operands_again(kernels, device):
    hidden, weight, *rest = inputs(2, 5, V=50, device=device)
    expected = gradients(kernels.linear_ppo_loss(hidden, weight, *rest)[0], hidden, weight)
    logprobs = kernels.linear_logprobs(hidden, weight, rest[0])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = gradients(kernels.linear_ppo_loss(hidden, weight, *rest)[0], hidden, weight)
        cast = kernels.linear_logprobs(hidden, weight, rest[0])
        with torch.no_grad():
            _, _, frozen, _ = kernels.linear_ppo_loss(hidden, weight, *rest)
        gradients(cast.sum(), hidden, weight)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(cast, logprobs)
    assert torch.equal(frozen, logprobs)


def test_only_the_trained_input_gets_a_gradient(kernels, device):
    x = make(2, 5, V=50, device=device)
    rest = [x[n] for n in BASIC[2:]]
    for trained in ("hidden", "weight", "bias"):
        head = {n: x[n].clone().requires_grad_(n == trained) for n in ("hidden", "weight", "bias")}
        kernels.linear_ppo_loss(head["hidden"], head["weight"], *rest, bias=head["bias"])[0].backward()
        kernels.linear_logprobs(head["hidden"], head["weight"], rest[0], bias=head["bias"]).sum().backward()
        assert {n for n, t in head.items() if t.grad is not None} == {trained}
    with torch.no_grad():
        loss, *_ = kernels.linear_ppo_loss(x["hidden"].requires_grad_(), x["weight"], *rest)
    assert not loss.requires_grad


def test_the_same_inputs_give_the_same_bits(kernels, device):
    hidden, weight, *rest = inputs(2, 5, V=500, device=device)
    runs = [gradients(kernels.linear_ppo_loss(hidden, weight, *rest)[0], hidden, weight) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_scoring_gives_the_bits_of_the_loss_so_the_first_ratio_is_one(kernels, device, frozen, monkeypatch):
    """As many rows to a product with gradients as without, also where there are several chunks."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 1 << 15)
    monkeypatch.setattr(chunks, "CPU_CHUNK_ROWS", 16)
    hidden, weight, tokens, _, advantages = inputs(4, 25, V=500, device=device)
    if frozen:
        weight.requires_grad_(False)
    with torch.no_grad():
        old, entropy = kernels.linear_logprobs(hidden, weight, tokens, with_entropy=True, temperature=0.7)
    _, stats, logprobs, same = kernels.linear_ppo_loss(hidden, weight, tokens, old, advantages, temperature=0.7)
    assert torch.equal(logprobs, old)
    assert torch.equal(entropy, same)
    assert stats["ratio_max"] == 1
    assert stats["approx_kl"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_cut_into_chunks_does_not_depend_on_the_gradients_wanted(dtype, in_place):
    """Products of another number of rows may have other bits, on a GPU above all."""
    for n in (100, 4200, 4500, 5000, 10000, 50000):
        hidden, weight = (torch.empty(rows, 2048, dtype=dtype, device="meta") for rows in (n, 30000))
        options = dict(native=True, in_place=in_place, chunk_bytes=None, logits_dtype=None, scratch_bytes=0)
        cuts = {
            chunks.make_plan(hidden, weight, chunks.Rows(None, n, None), needs=needs, **options).rows
            for needs in [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
        }
        assert len(cuts) == 1


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_distributed_weight_is_rejected(kernels):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    hidden, weight, *rest = inputs(2, 5, V=50, device=torch.device("cpu"))
    for placement, words in ((Shard(0), "vocabulary-parallel or otherwise sharded"), (Replicate(), "distributed")):
        sharded = distribute_tensor(weight.detach(), mesh, [placement])
        with pytest.raises(TypeError, match=rf"weight is a {words} DTensor .* pass weight\.full_tensor\(\)"):
            kernels.linear_ppo_loss(hidden, sharded, *rest)
        with pytest.raises(TypeError, match=r"linear_logprobs: weight is a .* forward of the FSDP2-wrapped module"):
            kernels.linear_logprobs(hidden, sharded, rest[0])
        kernels.linear_logprobs(hidden, sharded.full_tensor(), rest[0])


class Policy(nn.Module):
    def __init__(self, weight: Tensor, function: Callable) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, len(weight), bias=False)
        self.head.weight.data.copy_(weight.detach())
        self.function = function

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.function(self.body(x), self.head.weight, *rest)[0]


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_works_inside_an_fsdp2_forward(kernels):
    """Inside the wrapped module's forward the parameter is a plain tensor, and its gradient reaches the shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    hidden, weight, *rest = inputs(2, 5, V=50, device=torch.device("cpu"))
    plain = Policy(weight, kernels.linear_ppo_loss)
    wrapped = Policy(weight, kernels.linear_ppo_loss)
    wrapped.load_state_dict(plain.state_dict())
    fully_shard(wrapped, mesh=init_device_mesh("cpu", (1,)))  # the default is an accelerator, if there is one
    for module in (plain, wrapped):
        module(hidden.detach(), *rest).backward()
    torch.testing.assert_close(wrapped.head.weight.grad.full_tensor(), plain.head.weight.grad)
    torch.testing.assert_close(wrapped.body.weight.grad.full_tensor(), plain.body.weight.grad)


def compiled(function: Callable) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


NUMBERS = ("temperature", "logit_scale", "clip_low", "dual_clip", "entropy_coef", "kl_coef", "log_ratio_clamp")


@pytest.mark.parametrize("changing", ["N", "num_counted", "softcap", "denominator", *NUMBERS])
def test_torch_compile_keeps_one_graph_for_all_values(kernels, device, changing):
    """The operator in front of both backends is one code, so the slow interpreter tries one number only."""
    if kernels is TRITON and changing in NUMBERS[1:]:
        pytest.skip("as with the torch backend")

    def loss_of(hidden: Tensor, weight: Tensor, rest: list[Tensor], options: dict[str, Any]) -> Tensor:
        loss, stats, logprobs, entropy = kernels.linear_ppo_loss(hidden * 1.5, weight, *rest, **options)
        return 2 * loss + stats["ratio_mean"] + logprobs.sum() + entropy.sum()

    function, counter = compiled(loss_of)
    for i in range(12 if kernels is TORCH else 5):
        x = make(1, 3 + i if changing == "N" else 3, V=9, device=device)
        head = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
        rest = [x[n] for n in (*BASIC[2:], "mask")]
        options = {"ref_logprobs": x["ref_logprobs"], "kl_coef": 0.1, "entropy_coef": 0.1, "dual_clip": 3.0}
        if changing == "num_counted":
            rest[-1] = torch.arange(3, device=device).view(1, 3) <= i % 3
            options["num_counted"] = i % 3 + 1
        elif changing != "N":
            options[changing] = 1.1 + i / 7 if changing != "clip_low" else 0.1 + i / 70
        actual = gradients(function(*head, rest, options), *head)
        expected = gradients(loss_of(*head, rest, options), *head)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("changing", ["N", "temperature", "chunk_bytes"])
def test_compiled_linear_logprobs_is_reused_and_has_the_same_results(kernels, device, changing):
    def loss_of(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        logp, entropy = kernels.linear_logprobs(hidden * 1.5, weight, tokens, mask, with_entropy=True, **options)
        return (logp * logp.detach() - 0.1 * entropy).sum()

    function, counter = compiled(loss_of)
    for i in range(12 if kernels is TORCH else 5):
        x = make(1, 3 + i if changing == "N" else 3, V=9, device=device)
        head = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
        options = {} if changing == "N" else {changing: 5000 + i if changing == "chunk_bytes" else 1.1 + i / 7}
        actual = gradients(function(*head, x["tokens"], x["mask"], options), *head)
        expected = gradients(loss_of(*head, x["tokens"], x["mask"], options), *head)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 3


def test_compiling_works_without_gradients_or_entropy(kernels, device):
    x = make(1, 3, V=9, device=device)
    args = x["hidden"], x["weight"], x["tokens"]
    function, _ = compiled(lambda *a: kernels.linear_logprobs(*a))
    torch.testing.assert_close(function(*args, x["mask"]), kernels.linear_logprobs(*args, x["mask"]))
    x["weight"].requires_grad_()

    def gradient(f: Callable) -> Tensor:
        return gradients(f(*args, x["old_logprobs"], x["advantages"]), x["weight"])[0]

    def loss_of(*a: Tensor) -> Tensor:
        return kernels.linear_ppo_loss(*a, softcap=3.0)[0]

    torch.testing.assert_close(gradient(compiled(loss_of)[0]), gradient(loss_of))


class Recorder:
    """Replaces a kernel and records the configuration of each launch."""

    def __init__(self, kernel, launches: set) -> None:
        self.arg_names, self.name, self.launches = kernel.arg_names, kernel.fn.__name__, launches

    def run(self, *args, grid: tuple[int, ...], warmup: bool, **constexprs_and_options) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        assert not given["has_bias"] or given["bias_ptr"].data_ptr() % 16 == 0
        types = {name: str(x.dtype) for name, x in given.items() if isinstance(x, Tensor)}
        for name in ("logits_ptr", "logprobs_ptr", "entropy_ptr", "statistics_ptr"):
            if name in given:
                given[name].zero_()
        self.launches.add((self.name, *sorted(types.items()), *sorted(constexprs_and_options.items())))


KERNELS = ("linear_score_kernel", "linear_policy_kernel", "linear_gradient_kernel")


def test_the_launches_are_the_variants_that_the_gate_compiles(monkeypatch, device):
    pointers = {"*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32", "*i64": "int64"}
    gate = set()
    for v in launch.variants():
        if v.kernel.fn.__name__ not in KERNELS:
            continue
        assert list(v.types) + list(v.constexprs) == v.kernel.arg_names
        types = {name: f"torch.{pointers[t]}" for name, t in v.types.items() if t[0] == "*"}
        gate.add((v.kernel.fn.__name__, *sorted(types.items()), *sorted((v.constexprs | v.options).items())))
    launches: set = set()
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), launches))
    for V in (9, 8192):
        x = make(2, 3, V=V, device=device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            hidden, weight = (x[n].to(dtype).requires_grad_() for n in ("hidden", "weight"))
            for options in ({}, {"bias": x["bias"]}, {"softcap": 3.0}):
                for logits_dtype in (None, dtype):
                    own = {**options, "logits_dtype": logits_dtype}
                    TRITON.linear_ppo_loss(hidden, weight, *(x[n] for n in (*BASIC[2:], "mask")), **own)
                    TRITON.linear_logprobs(hidden, weight, x["tokens"], **own).sum().backward()
                    TRITON.linear_logprobs(hidden, weight, x["tokens"], with_entropy=True, **own)
    assert launches == gate  # and nothing is compiled that no launch can choose


def test_the_operators_follow_the_rules_of_torch_library(device):
    x = make(2, 3, V=9, device=device)
    head = [x["hidden"].requires_grad_(), x["weight"].requires_grad_(), None]
    head_scalars = torch.tensor([0.7, math.nan, 1.0]).double()
    scalars = torch.tensor([0.2, 0.2, math.nan, 20.0, 0.1, 0.0, math.nan, math.nan]).double()
    arguments = [*head, x["tokens"], x["old_logprobs"], x["advantages"], None, None, None, None, None]
    torch.library.opcheck(
        torch.ops.ppo_fast.linear_ppo_loss_torch.default,
        (*arguments, head_scalars, scalars, "k2", "token-mean", [True, True, False], None, None, None, None),
    )
    torch.library.opcheck(
        torch.ops.ppo_fast.linear_logprobs_torch.default,
        (*head, x["tokens"], None, head_scalars, True, [True, True, False], None, None, None, None),
    )
