"""The losses with strided tensors, autograd, torch.compile and a GPU: layouts, memory, graphs, launches."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import TORCH, TRITON, Operations
from support.backends import values_unread as values_unread_fixture
from support.launches import NOT_INTERPRETED, launched_by
from support.loss_cases import (
    AGGREGATIONS,
    EVERYTHING,
    GRADIENTS,
    OPTIONAL,
    POLICY,
    PPO,
    VALUE,
    check,
    close,
    evaluate,
    make,
    make_mask,
    ragged,
    the_same,
    to,
)
from support.loss_cases import backend as backend_fixture
from torch import Tensor

from ppo_fast.kernels import reference

backend = backend_fixture
values_unread = values_unread_fixture
pytestmark = pytest.mark.usefixtures("nan_empty")


BACKENDS = pytest.mark.parametrize("backend", [TRITON, TORCH], ids=repr)  # of torch.compile


# Layouts


def views(name: str) -> Callable[[Tensor], Tensor]:
    """From a contiguous [6, 8] tensor: the same values in another layout."""

    def sliced(x: Tensor) -> Tensor:
        wide = x.new_zeros(6, 17) if x.dtype == torch.bool else x.new_full((6, 17), torch.nan)
        wide[:, 5:13] = x
        return wide[:, 5:13]

    def every_other(x: Tensor) -> Tensor:
        wide = x.new_zeros(6, 16) if x.dtype == torch.bool else x.new_full((6, 16), torch.nan)
        wide[:, ::2] = x
        return wide[:, ::2]

    def offset(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 8)

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def deep(x: Tensor) -> Tensor:  # no view as [rows, T] exists
        return x.view(2, 3, 8).transpose(0, 1).contiguous().transpose(0, 1)

    return {
        "sliced": sliced,
        "every_other": every_other,
        "offset": offset,
        "transposed": transposed,
        "deep": deep,
    }[name]


@pytest.mark.parametrize("layout", ["sliced", "every_other", "offset", "transposed", "deep"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_strides_are_respected(backend, device, layout, aggregation):
    x, mask = make((6, 8), device), make_mask((6, 8), device)
    shape = (2, 3, 8) if layout == "deep" else (6, 8)
    plain = {name: t.view(shape) for name, t in x.items()}
    expected = evaluate(backend, plain, mask.view(shape), aggregation=aggregation, **EVERYTHING)
    view = views(layout)
    for some in (set(x), {"values", "advantages"}):  # all tensors, and a mixture of layouts
        mixed = {name: view(t) if name in some else plain[name] for name, t in x.items()}
        found = evaluate(
            backend,
            mixed,
            view(mask) if len(some) > 2 else mask.view(shape),
            leaf=lambda t: t.detach().requires_grad_(),
            aggregation=aggregation,
            **EVERYTHING,
        )
        the_same(found, expected)
        for name in expected[2]:
            close(found[2][name], expected[2][name])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_expanded_advantages_match_the_reference(backend, device, aggregation):
    x, mask = make((6, 8), device), make_mask((6, 8), device)
    for small in (x["advantages"][:, :1], x["advantages"][:1], x["advantages"][:1, :1]):
        check(backend, x | {"advantages": small.expand(6, 8)}, mask, aggregation=aggregation)


def test_packed_tensors_with_a_stride_give_the_same_results(backend, device):
    _, _, packed, mask, cu_seqlens = ragged(device)
    wide = {name: torch.stack([t, t * torch.nan], -1)[:, 0] for name, t in packed.items()}
    options = {"aggregation": "seq-mean-token-mean", "cu_seqlens": cu_seqlens}
    the_same(evaluate(backend, wide, mask, **options), evaluate(backend, packed, mask, **options))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_row_stride_past_2_to_the_31_elements_is_exact(device, aggregation):
    # Untouched memory: the system hands out pages only where something is written.
    rows, T, stride = 3, 4, 2**31 // 2 + 8
    x, mask = make((rows, T), device), make_mask((rows, T), device)
    storage = torch.UntypedStorage(2 * ((rows - 1) * stride + T), device=device)
    far = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (rows, T), (stride, 1))
    far.copy_(x["logprobs"])
    near = x | {"logprobs": x["logprobs"].half()}
    expected = evaluate(TRITON, near, mask, aggregation=aggregation)
    found = evaluate(TRITON, x | {"logprobs": far}, mask, aggregation=aggregation, leaf=lambda t: t.requires_grad_())
    the_same(found, expected)


def test_mixed_dtypes_give_each_gradient_the_dtype_of_its_input(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    half = {"logprobs", "old_values", "entropy", "weights"}
    mixed = {name: t.half() if name in half else t for name, t in x.items()}
    out, _, grads = evaluate(backend, mixed, mask, **EVERYTHING)
    truth, _, true_grads = evaluate(reference, to(mixed, torch.float64), mask, **EVERYTHING)
    assert out.dtype == torch.float32
    close(out, truth, 1e-5)
    assert [grads[name].dtype for name in GRADIENTS] == [torch.float16, torch.float32, torch.float16]
    for name in grads:
        close(grads[name].float(), true_grads[name], 1e-3)  # one rounding to fp16


# Autograd


def test_a_second_backward_equals_the_first(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    leaves = [x[name].requires_grad_() for name in GRADIENTS]
    inputs = [x[name] for name in PPO]
    out, _ = backend.ppo_loss(*inputs, mask, entropy=x["entropy"], entropy_coef=0.1)
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    scaled = torch.autograd.grad(out, leaves, torch.tensor(-3.0, device=device), retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    for a, b, c in zip(first, scaled, again, strict=True):
        assert torch.equal(a, c)
        close(b, -3 * a)


def test_a_loss_may_be_divided_in_place(backend, device):
    x = {name: t for name, t in make((4, 20), device).items() if name in POLICY}
    _, stats, grads = evaluate(backend, x, kind="policy")
    leaf = x["logprobs"].clone().requires_grad_()
    out, found = backend.policy_loss(leaf, x["old_logprobs"], x["advantages"])
    out /= 4
    out.backward()
    close(leaf.grad, grads["logprobs"] / 4)
    assert torch.equal(found["policy_loss"], stats["policy_loss"])


def test_create_graph_is_an_error(backend, device):
    x = make((2, 3), device)
    leaf = x["logprobs"].requires_grad_()
    out, _ = backend.ppo_loss(*(x[name] for name in PPO))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(out, leaf, create_graph=True)[0].sum(), leaf)


def test_a_constant_gets_no_gradient(backend, device):
    x = {name: t.requires_grad_() for name, t in make((2, 3), device).items()}
    inputs = {name: x[name] for name in OPTIONAL}
    out, _ = backend.ppo_loss(*(x[name] for name in PPO), **inputs, **EVERYTHING)
    out.backward()
    assert {name for name, t in x.items() if t.grad is not None} == set(GRADIENTS)


SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(GRADIENTS, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_any_subset_of_the_gradients_is_that_of_the_reference(backend, device, wanted, aggregation):
    x, mask = make((3, 40), device), make_mask((3, 40), device)
    options = EVERYTHING | {"aggregation": aggregation}
    _, _, truth = evaluate(reference, to(x, torch.float64), mask, **options)
    for name in wanted:
        x[name].requires_grad_()
    out, _ = backend.ppo_loss(*(x[name] for name in PPO), mask, **{name: x[name] for name in OPTIONAL}, **options)
    out.backward()
    for name in GRADIENTS:
        if name in wanted:
            close(x[name].grad, truth[name])
        else:
            assert x[name].grad is None


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_backward_fills_no_tensor(device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]
    out, _ = TRITON.ppo_loss(*inputs, mask, entropy=x["entropy"].requires_grad_(), entropy_coef=0.1)
    upstream = torch.ones((), device=device)
    with Calls() as calls:
        torch.autograd.grad(out, [x[name] for name in GRADIENTS], upstream)
    assert not [name for name in calls.names if "zero" in name or "ones" in name]


def test_a_lazily_negated_upstream_gradient_keeps_its_sign(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    leaf = x["logprobs"].requires_grad_()
    out, _ = backend.policy_loss(*(x[name] for name in POLICY), mask)
    negated = torch.complex(torch.ones((), device=device), -torch.ones((), device=device)).conj().imag
    assert negated.is_neg()
    (found,) = torch.autograd.grad(out, leaf, negated, retain_graph=True)
    assert torch.equal(found, torch.autograd.grad(out, leaf)[0])


def test_an_unused_loss_has_no_gradient(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    leaf = x["logprobs"].requires_grad_()
    unused, _ = backend.policy_loss(*(x[name] for name in POLICY), mask)
    used, _ = backend.policy_loss(*(x[name] for name in POLICY), mask)
    torch.stack([unused.detach(), used]).sum().backward()
    assert leaf.grad.any()


@pytest.mark.parametrize(
    "boundaries", [[0, 5], [3, 9], [0, 9, 4], [2, 2], [-7, 4], [0, 5, 90], [50, 60], [7], [0]], ids=str
)
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.usefixtures("values_unread")
def test_steps_outside_the_sequences_have_zero_gradients_and_no_address_is_outside(device, boundaries, aggregation):
    """Wrong boundaries on a GPU, where they are not checked: memory around the tensors does not change."""
    T = 12
    around = {name: torch.full((3 * T,), torch.nan, device=device) for name in PPO}
    x = {name: around[name][T : 2 * T].copy_(t) for name, t in make((T,), device).items() if name in PPO}
    leaves = [x[name].requires_grad_() for name in ("logprobs", "values")]
    cu_seqlens = torch.tensor(boundaries, device=device, dtype=torch.int32)
    out, stats = TRITON.ppo_loss(*(x[name] for name in PPO), aggregation=aggregation, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out, leaves)
    inside = torch.zeros(T, dtype=torch.bool)
    for first, last in itertools.pairwise(boundaries):
        inside[max(first, 0) : max(last, 0)] = True
    assert out.isfinite()
    assert all(value.isfinite() for value in stats.values())
    for grad in grads:
        assert grad.isfinite().all()
        assert not grad[~inside].any()
    assert all(t[:T].isnan().all() and t[2 * T :].isnan().all() for t in around.values())


def test_without_gradients_no_buffer_for_them_is_allocated(device, monkeypatch):
    x, mask = make((4, 1000), device), make_mask((4, 1000), device)
    sizes: list[int] = []
    empty = torch.empty

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", recording)
    out, stats = TRITON.ppo_loss(*(x[name] for name in PPO), mask)
    with torch.no_grad():
        TRITON.ppo_loss(*(x[name].requires_grad_() for name in PPO), mask)
    assert max(sizes) < 1000
    assert not out.requires_grad
    assert not any(value.requires_grad for value in stats.values())
    sizes.clear()
    TRITON.ppo_loss(*(x[name] for name in PPO), mask)
    assert 8000 <= max(sizes) < 12000  # two of three


def test_without_gradients_the_torch_backend_computes_none(device):
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x, mask = make((4, 20), device), make_mask((4, 20), device)
    inputs = [x[name].double() for name in PPO]  # small fp32 ones take one compiled loop, where numba is
    with Count() as without:
        TORCH.ppo_loss(*inputs, mask)
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    with Count() as with_gradients:
        TORCH.ppo_loss(*inputs, mask)
    assert without.calls < with_gradients.calls - 8
    with torch.no_grad(), Count() as disabled:
        TORCH.ppo_loss(*inputs, mask)
    assert disabled.calls == without.calls


def test_gradcheck_passes_in_fp64(device):
    x, mask = to(make((3, 5), device), torch.float64), make_mask((3, 5), device)
    leaves = [x[name].requires_grad_() for name in GRADIENTS]

    def run(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        rest = [x[name] for name in ("old_logprobs", "old_values", "advantages", "returns")]
        more = {"weights": x["weights"], "ref_logprobs": x["ref_logprobs"], "aggregation": "seq-mean-token-mean"}
        return TORCH.ppo_loss(logprobs, values, *rest, mask, entropy=entropy, **more, **EVERYTHING)[0]

    assert torch.autograd.gradcheck(run, leaves)


def test_checkpointing_does_not_change_the_gradients(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    _, _, expected = evaluate(backend, x, mask, aggregation="seq-mean-token-mean", **EVERYTHING)
    inputs = {name: x[name] for name in OPTIONAL if name != "entropy"}

    def run(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        rest = [x[name] for name in ("old_logprobs", "old_values", "advantages", "returns")]
        options = {"aggregation": "seq-mean-token-mean", **inputs, **EVERYTHING}
        return backend.ppo_loss(1 * logprobs, 1 * values, *rest, mask, entropy=1 * entropy, **options)[0]

    for use_reentrant in (False, True):
        leaves = [x[name].clone().requires_grad_() for name in GRADIENTS]
        torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=use_reentrant).backward()
        for leaf, name in zip(leaves, GRADIENTS, strict=True):
            assert torch.equal(leaf.grad, expected[name])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ddp_works_where_a_term_has_no_weight(backend):
    """With value_coef = 0 or entropy_coef = 0 what the term depends on still takes part in each step."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = torch.nn.ParameterList([torch.ones(()) for _ in range(3)])

        def forward(self, x: dict[str, Tensor], **options: Any) -> Tensor:
            names = ("logprobs", "values", "entropy")
            learned = {name: x[name] * scale for name, scale in zip(names, self.scales, strict=True)}
            return backend.ppo_loss(*({**x, **learned}[n] for n in PPO), entropy=learned["entropy"], **options)[0]

    def reduced(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # over one rank
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    x = make((2, 5), torch.device("cpu"))
    # Not gloo: a thread of it may want the GIL to free a tensor while the group's destructor waits for it with the GIL
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Model())
        model.register_comm_hook(None, reduced)
        for coefficients in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.1), (0.5, 0.1)):
            model.zero_grad()
            model(x, value_coef=coefficients[0], entropy_coef=coefficients[1]).backward()
            gradients = [scale.grad for scale in model.module.scales[1:]]
            assert [g is not None and bool(g != 0) for g in gradients] == [c != 0 for c in coefficients]
    finally:
        dist.destroy_process_group()


def test_autocast_does_not_change_the_arithmetic(backend, device):
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    expected = evaluate(backend, x, mask, **EVERYTHING)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = evaluate(backend, x, mask, **EVERYTHING)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[2][name], expected[2][name]) for name in GRADIENTS)


def test_a_repetition_gives_the_same_bits(backend, device):
    slow = backend is TRITON and device.type == "cpu"  # the PTX interpreter
    shape, repeats = ((2, 300), 4) if slow else ((5, 700), 100)
    x, mask = make(shape, device), make_mask(shape, device)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        first = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
        for _ in range(repeats):
            again = evaluate(backend, x, mask, aggregation=aggregation, **EVERYTHING)
            assert torch.equal(first[0], again[0])
            assert all(torch.equal(first[2][name], again[2][name]) for name in GRADIENTS)


# torch.compile


SCALARS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "log_ratio_clamp",
    "entropy_coef",
    "kl_coef",
    "value_coef",
    "value_clip",
)


def count_graphs(function: Callable, calls: list[tuple]) -> tuple[int, list]:
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = [compiled(*call) for call in calls]
    return counter.frame_count, results


def compiled_call(backend: Operations, aggregation: str) -> Callable:
    def run(leaves: tuple[Tensor, ...], rest: tuple[Tensor, ...], mask: Tensor, numbers: tuple[float, ...]):
        logprobs, values, entropy = leaves
        old_logprobs, old_values, advantages, returns, ref_logprobs = rest
        named = dict(zip((*SCALARS, "denominator"), numbers, strict=True))
        return backend.ppo_loss(
            2 * logprobs,
            values.exp(),
            old_logprobs,
            old_values,
            advantages,
            returns,
            mask,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            kl_estimator="k3",
            aggregation=aggregation,
            **named,
        )

    return run


def compile_inputs(shape: tuple[int, ...], device: torch.device) -> tuple:
    x = make(shape, device)
    leaves = tuple(x[name].requires_grad_() for name in GRADIENTS)
    rest = tuple(x[name] for name in ("old_logprobs", "old_values", "advantages", "returns", "ref_logprobs"))
    return leaves, rest, make_mask(shape, device)


@BACKENDS
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_torch_compile_keeps_one_graph_for_all_sizes_and_numbers(backend, device, aggregation):
    base = (0.2, 0.2, 3.0, 20.0, 0.01, 0.1, 0.5, 0.2, 7.0)
    calls = [
        (*compile_inputs((3 + i, 5 + 2 * i), device), tuple(number * (1 + 0.01 * i) for number in base))
        for i in range(12)
    ]
    function = compiled_call(backend, aggregation)
    graphs, results = count_graphs(function, calls)
    assert graphs <= 3
    for i in (0, 1, 11):
        (found, stats), call = results[i], calls[i]
        expected, expected_stats = function(*call)
        close(found, expected)
        assert not any(value.requires_grad for value in stats.values())
        for name in stats:
            close(stats[name], expected_stats[name])
        for a, b in zip(torch.autograd.grad(found, call[0]), torch.autograd.grad(expected, call[0]), strict=True):
            close(a, b)


@BACKENDS
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_torch_compile_works_without_gradients_and_with_a_denominator_on_the_device(backend, device, kind):
    x, mask = make((3, 8), device), make_mask((3, 8), device)
    names = POLICY if kind == "policy" else VALUE
    denominator = torch.tensor(5, device=device)

    def run(*tensors: Tensor) -> tuple:
        options = {"aggregation": "seq-mean-token-sum-norm", "denominator": tensors[-1]}
        return getattr(backend, f"{kind}_loss")(*tensors[:-1], **options)

    call = (*(x[name] for name in names), mask, denominator)
    _, [(found, stats)] = count_graphs(run, [call])
    expected, expected_stats = run(*call)
    close(found, expected)
    assert stats.keys() == expected_stats.keys()
    assert found.dtype == torch.float32


def test_the_operator_for_torch_compile_follows_the_rules_of_torch_library(device):
    x, mask = make((2, 8), device), make_mask((2, 8), device)  # 16 steps: the buffer of gradients has no padding
    numbers = torch.tensor([0.2, 0.2, math.nan, 20.0, 0.1, 0.1, 1.0, 0.2, math.nan, math.nan], dtype=torch.float64)
    x["logprobs"].requires_grad_()
    names = ("logprobs", "entropy", "values", "old_logprobs", "advantages")
    tensors = [
        *(x[name] for name in names),
        mask,
        *(x[n] for n in ("weights", "ref_logprobs", "old_values", "returns")),
    ]
    inputs = (*tensors, None, None, None, numbers, "k3", "token-mean", [True, False, False])
    torch.library.opcheck(torch.ops.ppo_fast.ppo_loss.default, inputs)


# On a GPU


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_bf16_errs_at_most_twice_as_much_as_eager_pytorch(backend, device, aggregation):
    shape = (16, 1024) if device.type == "cuda" else (3, 600)
    x, mask = to(make(shape, device), torch.bfloat16), make_mask(shape, device)
    check(backend, x, mask, aggregation=aggregation, **EVERYTHING)


@NOT_INTERPRETED
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_forward_takes_two_launches_and_a_backward_one(monkeypatch, device, aggregation):
    monkeypatch.undo()  # poisoning an empty tensor is one more launch
    shape = (16, 1024) if device.type == "cuda" else (3, 40)
    x, mask = make(shape, device), make_mask(shape, device)
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]
    names, (out, _) = launched_by(lambda: TRITON.ppo_loss(*inputs, mask, aggregation=aggregation), device)
    assert 1 <= len(names) <= 2, names
    one = torch.ones((), device=device)
    names, _ = launched_by(lambda: torch.autograd.grad(out, inputs[:2], one, retain_graph=True), device)
    assert len(names) == 1, names


@pytest.mark.needs_gpu
def test_the_host_does_not_wait_for_the_device(backend, device):
    x, mask = make((16, 1024), device), make_mask((16, 1024), device)
    denominator = mask.sum()
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for aggregation in AGGREGATIONS[:1] + AGGREGATIONS[2:]:
            for given_count in (None, denominator):
                out, _ = backend.ppo_loss(*inputs, mask, aggregation=aggregation, denominator=given_count)
                out.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_gpu
def test_a_cuda_graph_can_capture_it(backend, device):
    x, mask = make((16, 1024), device), make_mask((16, 1024), device)
    inputs = [x[name].requires_grad_(name in GRADIENTS) for name in PPO]

    def run() -> tuple:
        out, stats = backend.ppo_loss(*inputs, mask)
        return out, stats, torch.autograd.grad(out, inputs[:2])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t) * 0.3)
    graph.replay()
    expected = run()
    assert torch.equal(captured[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[2], expected[2], strict=True))


def test_the_compiled_loop_computes_the_small_losses_that_it_supports(monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    from ppo_fast.kernels.loss import cpu

    taken = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *arguments: taken.append(1) or forward(*arguments))
    device = torch.device("cpu")
    x, mask = make((4, 20), device), make_mask((4, 20), device)
    plain = [x[name] for name in POLICY]
    TORCH.policy_loss(*plain, mask)
    assert len(taken) == 1
    optional = {name: x[name] for name in OPTIONAL}
    for aggregation in AGGREGATIONS:
        TORCH.ppo_loss(*(x[name] for name in PPO), mask, aggregation=aggregation, **optional, **EVERYTHING)
        denominator = None if aggregation == "token-sum" else torch.tensor(3)
        TORCH.value_loss(*(x[name] for name in VALUE), aggregation=aggregation, denominator=denominator)
    assert len(taken) == 11
    TORCH.policy_loss(*(t.double() for t in plain), mask)
    TORCH.policy_loss(plain[0].half(), *plain[1:], mask)
    TORCH.policy_loss(*plain, mask, weights=x["weights"].bfloat16())
    TORCH.policy_loss(*(t.t().contiguous().t() for t in plain), mask)
    TORCH.policy_loss(*plain, mask.t().contiguous().t())
    TORCH.policy_loss(*(t.flatten() for t in plain), cu_seqlens=torch.tensor([0, 30, 80], dtype=torch.int32))
    TORCH.ppo_loss(*(x[name] for name in PPO), mask, value_mask=~mask)
    big = [torch.zeros(cpu.MOST + 1)] * 3
    TORCH.policy_loss(*big)
    assert len(taken) == 11
