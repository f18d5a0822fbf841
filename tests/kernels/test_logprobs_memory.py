"""What token_logprobs reads, writes, keeps and overwrites; strides, addresses past 2^31, autograd and torch.compile."""

import math
from collections.abc import Callable

import pytest
import torch
from support.backends import BACKENDS, TORCH, TRITON
from support.backends import values_unread as values_unread_fixture
from support.launches import NOT_INTERPRETED, launched_by
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ppo_fast.kernels import reference
from ppo_fast.kernels.linear import launch as launch_linear
from ppo_fast.kernels.logprobs import custom_op, eager, launch

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, about lanes that are not stored
]

KERNELS = {name: getattr(launch, name) for name in ("token_logprobs_fwd_kernel", "token_logprobs_bwd_kernel")}
values_unread = values_unread_fixture


@pytest.fixture(params=list(BACKENDS))
def token_logprobs(request: pytest.FixtureRequest):
    return BACKENDS[request.param].token_logprobs


def make(*shape: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, tokens, mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * 3
    tokens = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    mask = torch.rand(shape[:-1], generator=generator) < 0.7
    return logits.to(device), tokens.to(device), mask.to(device)


class Traffic(TorchDispatchMode):
    """Counts, in units of `big` elements, what operators read and write of tensors in storages that large or larger.

    It counts operators on big tensors by their schema, so that none hides traffic.
    """

    WRITE_ONLY = ("aten.copy_", "aten.zero_", "aten.fill_", "aten.index_fill_", "aten.index_copy_", "aten.index_put_")

    def __init__(self, big: int, itemsize: int) -> None:
        super().__init__()
        self.big, self.bytes = big, big * itemsize
        self.read = self.written = 0.0
        self.largest_small = 0

    def is_big(self, x: object) -> bool:
        if not isinstance(x, Tensor):
            return False
        size = x.untyped_storage().nbytes()
        if size < self.bytes:
            self.largest_small = max(self.largest_small, size)
        return size >= self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace != "aten" or "empty" in func.__name__:
            return out
        name = str(func)
        arguments = [*zip(func._schema.arguments, args, strict=False)]
        arguments += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        touched = next((x.numel() for x in (out, *args[::-1]) if isinstance(x, Tensor) and not self.is_big(x)), 0)
        for argument, x in arguments:
            if not self.is_big(x):
                continue
            rows_only = any(word in name for word in ("index", "gather"))
            elements = (touched if rows_only else x.numel()) / self.big
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if "index_fill_" in name:
                elements = args[2].numel() * x.shape[-1] / self.big
            self.written += elements if writes else 0
            if not writes or not (argument.is_out or name.startswith(self.WRITE_ONLY)):
                self.read += elements
        if self.is_big(out) and not any(out is x for _, x in arguments):
            self.written += out.numel() / self.big
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", ["plain", "masked", "sliced", "inplace"])
def test_the_torch_backend_traverses_the_logits_three_times(monkeypatch, with_entropy, dtype, view):
    """Peers make 7 to 59 traversals of tensors as large as the logits (anchors/trainers.md, section 2)."""
    monkeypatch.undo()  # poisoning is a traversal too
    B, T, V = 4, 150, 8192
    logits, tokens, mask = make(B, T + 2, V, device=torch.device("cpu"))
    logits = logits.to(dtype).requires_grad_()
    x = logits[:, 1:-1] if view == "sliced" else logits.detach()[:, :T].contiguous().requires_grad_()
    tokens, mask = tokens[:, :T], mask[:, :T] if view == "masked" else None
    traffic = Traffic(B * T * V, dtype.itemsize)
    with traffic:
        out = TORCH.token_logprobs(
            x, tokens, mask, temperature=0.7, with_entropy=with_entropy, inplace_backward=view == "inplace"
        )
        upstream = [torch.ones_like(o) for o in (out if with_entropy else [out])]
        torch.autograd.grad(out, x, upstream)
    counted = 1.0 if mask is None else mask.float().mean().item()
    assert traffic.read == pytest.approx(2 * counted)  # rows under the mask are not even read
    assert traffic.written == pytest.approx(1)
    assert traffic.largest_small <= 8 << 20


def test_the_traffic_counter_counts_the_traffic_of_plain_pytorch():
    """The counter itself: log_softmax, gather and their backward read 1 + V-less, write 1, then 3 and 2."""
    logits, tokens, _ = make(64, 1000, device=torch.device("cpu"))
    traffic = Traffic(64 * 1000, 4)
    with traffic:
        out = logits.requires_grad_().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
        torch.autograd.grad(out.sum(), logits)
    assert traffic.read >= 3
    assert traffic.written >= 2


@pytest.mark.parametrize("with_entropy", [False, True])
def test_masked_rows_reach_no_result_where_the_mask_is_not_read(monkeypatch, with_entropy):
    """On other devices than a CPU masked rows are read and discarded; here a CPU is used as such a device."""
    logits, tokens, mask = make(4, 3, 33, device=torch.device("cpu"))
    logits[~mask], tokens[~mask] = math.nan, -100
    results = []
    for look in (True, False):
        monkeypatch.setattr(eager, "_readable", lambda x, look=look: look)
        for x in (logits.clone(), logits.transpose(0, 1).contiguous().transpose(0, 1)):
            x.requires_grad_()
            out = TORCH.token_logprobs(x, tokens, mask, temperature=0.7, with_entropy=with_entropy)
            out = out if with_entropy else (out,)
            upstream = [torch.ones(4, 3).masked_fill(~mask, math.nan)] * len(out)
            results.append([*(o.detach() for o in out), torch.autograd.grad(out, x, upstream)[0]])
    for result in results:
        assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(results[0], result, strict=True))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of [4, 7, 6, V], or of tokens with a last dimension of 1
    "sliced_steps": lambda x: x[:, 3:-1, 0],
    "every_other": lambda x: x[::2, ::3, 0],
    "transposed": lambda x: x[:, :, 0].transpose(0, 1),
    "three_leading_dimensions": lambda x: x[:2, 1:4, 1:-1],
    "four_dimensions_merged": lambda x: x[3:],
    "expanded": lambda x: x[:1, :1, 0].expand(3, 5, *x.shape[3:]),
    "one_row": lambda x: x[2, 3, 1],
}


@pytest.mark.parametrize("V", [129, 2051])
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_strided_view_gives_the_results_of_a_contiguous_copy(token_logprobs, device, name, V):
    """rl_games #358. The gradient of a view lands in the right place of its base."""
    logits, tokens, mask = make(4, 7, 6, V, device=device)
    view = VIEWS[name]
    t, m = (view(x.unsqueeze(-1)).squeeze(-1) for x in (tokens, mask))
    results = []
    for function, contiguous in ((token_logprobs, False), (token_logprobs, True)):
        base = logits.clone().requires_grad_()
        x = view(base)
        logp, entropy = function(x.contiguous() if contiguous else x, t, m, temperature=0.7, with_entropy=True)
        (logp * torch.arange(logp.numel(), device=device).view_as(logp) - entropy).sum().backward()
        results.append((logp.detach(), entropy.detach(), base.grad))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)


@pytest.mark.parametrize("V", [3, 130, 2051])
def test_padded_rows_and_strided_vocabularies_give_the_same_results(token_logprobs, device, V):
    logits, tokens, mask = make(3, 5, V, device=device)
    expected, gradient = run(token_logprobs, logits, tokens, mask)
    padded = torch.nn.functional.pad(logits, (0, 3), value=math.nan)[..., :V]
    across = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    skipping = torch.stack([logits, torch.full_like(logits, math.nan)], dim=-1)[..., 0]
    assert across.stride(-1) != 1 != skipping.stride(-1)
    for x in (padded, across, skipping):
        actual, grad = run(token_logprobs, x, tokens, mask)
        assert torch.equal(actual, expected)
        assert torch.equal(grad, gradient)


def run(token_logprobs, logits: Tensor, tokens: Tensor, mask: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """logp, and the gradient of a weighted sum, for logits with their strides."""
    x = logits.detach().requires_grad_()
    logp = token_logprobs(x, tokens, mask, **options)
    weight = torch.arange(1.0, logp.numel() + 1, device=logits.device).view_as(logp)
    return logp.detach(), torch.autograd.grad(logp, x, weight)[0]


def test_tokens_at_odd_addresses_and_of_int32_match_the_reference(token_logprobs, device):
    """flash-attention's cross entropy pads int64 labels that do not start at 16 bytes."""
    logits, _, mask = make(6, 129, device=device)
    for dtype in (torch.int64, torch.int32):
        pool = torch.arange(40, device=device, dtype=dtype) * 3
        for tokens in (pool[1:7], pool[3:33:5], pool[2:3].expand(6), pool.view(5, 8)[:, 1:].t()[:6, 1]):
            expected = reference.token_logprobs(logits, tokens, mask)
            torch.testing.assert_close(token_logprobs(logits, tokens, mask), expected, rtol=1e-5, atol=1e-5)


def test_inplace_backward_writes_the_same_gradient_over_the_logits(token_logprobs, device):
    logits, tokens, mask = make(3, 5, 2051, device=device)
    _, expected = run(token_logprobs, logits, tokens, mask)
    for x in (logits.clone(), logits.transpose(0, 1).contiguous().transpose(0, 1)):
        _, grad = run(token_logprobs, x, tokens, mask, inplace_backward=True)
        assert torch.equal(grad, expected)
        assert grad.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


def test_inplace_backward_overwrites_logits_with_three_leading_dimensions(token_logprobs, device):
    base, tokens, mask = make(3, 5, 4, 33, device=device)
    x, t, m = base[:, 1:-1, 1:-1], tokens[:, 1:-1, 1:-1], mask[:, 1:-1, 1:-1]
    _, expected = run(token_logprobs, x.clone(), t, m)
    _, grad = run(token_logprobs, x, t, m, inplace_backward=True)
    assert torch.equal(grad, expected)
    assert torch.equal(x, expected)


def test_a_second_inplace_backward_is_an_error(token_logprobs, device):
    logits, tokens, _ = make(3, 129, device=device)
    loss = token_logprobs(logits.requires_grad_(), tokens, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_consumer_of_overwritten_logits_is_an_error(token_logprobs, device):
    """Liger #272, #343, #1251. square() has saved the logits; whichever backward runs later must raise an error."""
    logits, tokens, _ = make(3, 129, device=device)
    x = logits.requires_grad_() * 1
    other = x.square().sum()
    logp = token_logprobs(x, tokens, inplace_backward=True)
    version = x._version
    logp.sum().backward(retain_graph=True)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("view", [lambda x: x[:1].expand(3, -1), lambda x: x.view(-1).unfold(0, 50, 10)])
def test_inplace_backward_rejects_two_elements_with_one_address(token_logprobs, device, view):
    x = view(make(3, 129, device=device)[0]).requires_grad_()
    tokens = torch.zeros(x.shape[0], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="inplace_backward=True needs logits whose elements"):
        token_logprobs(x, tokens, inplace_backward=True)


def test_logits_changed_before_backward_are_an_error(token_logprobs, device):
    logits, tokens, _ = make(3, 129, device=device)
    x = logits.requires_grad_() * 1
    logp = token_logprobs(x, tokens)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_outputs_changed_before_backward_do_not_change_the_gradient(token_logprobs, device):
    """trl-losses tests it too: backward must not read what the caller may overwrite."""
    logits, tokens, _ = make(3, 129, device=device)
    expected = run(token_logprobs, logits, tokens)[1]
    x = logits.requires_grad_()
    logp = token_logprobs(x, tokens)
    weight = torch.arange(1.0, 4, device=device)
    loss = (logp * weight).sum()
    with torch.no_grad():
        logp.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("rows", [(3,), (2, 3)])
def test_addresses_past_two_to_the_31_are_exact(token_logprobs, device, rows):
    """Rows 2^30 + 5 elements apart: only the pages that are touched exist. int32 offsets would go below the buffer."""
    V, gap = 129, 2**30 + 5
    strides = (gap,) if rows == (3,) else (V, gap)
    elements = 2 * gap + 2 * V
    storage = torch.UntypedStorage(2 * elements, device=device)
    lazy = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (*rows, V), (*strides, 1))
    dense, tokens, mask = make(*rows, V, device=device)
    lazy.copy_(dense)
    expected, gradient = run(token_logprobs, dense.half(), tokens, mask)
    actual, grad = run(token_logprobs, lazy, tokens, mask, inplace_backward=True)
    assert torch.equal(actual, expected)
    assert torch.equal(grad, gradient)
    assert grad.data_ptr() == lazy.data_ptr()


class Recorder:
    """Replaces a kernel and records the configuration of each launch."""

    def __init__(self, kernel, launches: set) -> None:
        self.arg_names, self.name, self.launches = kernel.arg_names, kernel.fn.__name__, launches

    def run(self, *args, grid: tuple[int, ...], warmup: bool, **constexprs_and_options) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        types = {name: f"*{x.dtype}" for name, x in given.items() if isinstance(x, Tensor)}
        self.launches.add((self.name, *sorted(types.items()), *sorted(constexprs_and_options.items())))


def entropy_of(*args, **options) -> Tensor:
    return TRITON.token_logprobs(*args, with_entropy=True, **options)[1]


def record(monkeypatch, logits: Tensor, *args, function=TRITON.token_logprobs, **options) -> set:
    """What a run of the Triton backend launches; nothing is started."""
    launches: set = set()
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(launch, name, Recorder(kernel, launches))
    run(function, logits, *args, **options)
    return launches


def test_a_sliced_batch_is_not_copied(monkeypatch, device):
    """[B, T, V] sliced in T, the usual case: no operator may read or make anything as large as the logits."""
    monkeypatch.undo()  # poisoning is a traversal too
    logits, tokens, mask = make(3, 9, 2051, device=device)
    for x in (logits[:, 3:-1], logits[:, 3:-1].transpose(0, 1)):
        steps = (tokens, mask) if x.shape[0] == 3 else (tokens.t(), mask.t())
        slices = (y[:, 3:-1] if x.shape[0] == 3 else y[3:-1] for y in steps)
        traffic = Traffic(x.numel(), 4)
        with traffic:
            assert len(record(monkeypatch, x, *slices)) == 2
        assert (traffic.read, traffic.written) == (0, 0)


def test_the_launches_are_the_variants_that_the_gate_compiles(monkeypatch, device):
    monkeypatch.undo()  # poisoning is a traversal too
    pointers = {"*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32", "*i64": "int64", "*u1": "bool"}
    gate = set()
    for v in launch.variants():
        types = {name: f"*torch.{pointers[t]}" for name, t in v.types.items() if t[0] == "*"}
        gate.add((v.kernel.fn.__name__, *sorted(types.items()), *sorted((v.constexprs | v.options).items())))
    assert all(list(v.types) + list(v.constexprs) == v.kernel.arg_names for v in launch.variants())
    launches: set = set()
    for V in (1, 2, 7, 8, 64, 65, 72, 1000, 1024, 1025, 1032, 8192, 8196, 8198, 8200):
        base = torch.zeros(3, 4, 2 * V + 16, device=device)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            x = base.to(dtype)
            dense = x[..., :V].contiguous()
            for view in (dense, x[..., :V], x[..., 1 : V + 1], x[..., : 2 * V : 2]):
                tokens = torch.zeros(3, 4, dtype=torch.int64, device=device)
                launches |= record(monkeypatch, view, tokens.int())
                launches |= record(monkeypatch, view, tokens, inplace_backward=True)
                launches |= record(monkeypatch, view, tokens, function=entropy_of)
                launches |= record(monkeypatch, view, tokens, function=entropy_of, inplace_backward=True)
                launches |= record(monkeypatch, view.transpose(0, 1), tokens.t())
    assert launches == gate  # and nothing is compiled that no launch can choose


def test_entropy_is_computed_in_the_loop_only_if_requested(monkeypatch, device):
    logits, tokens, _ = make(3, 5000, device=device)
    for function, expected in ((TRITON.token_logprobs, False), (entropy_of, True)):
        launches = record(monkeypatch, logits, tokens, function=function)
        assert {dict(x for x in launch[1:])["WITH_ENTROPY"] for launch in launches} == {expected}


@pytest.mark.parametrize("module", [launch, launch_linear], ids=lambda module: module.__name__.split(".")[-2])
def test_a_partial_sum_belongs_to_one_thread_whether_warps_have_32_or_64(module):
    for threads_per_warp in (32, 64):
        for v in module.variants(threads_per_warp):
            threads = v.options["num_warps"] * threads_per_warp
            if v.constexprs["BLOCK"] > 1024 and "LANES" in v.constexprs:
                itemsize = 4 if v.types["logits_ptr"] == "*fp32" else 2
                assert v.constexprs["LANES"] % (threads * 16 // itemsize) == 0, v.name


def test_checkpointing_and_autocast_do_not_change_the_result(token_logprobs, device):
    logits, tokens, mask = make(3, 129, device=device)
    expected, gradient = run(token_logprobs, logits, tokens, mask)
    weight = torch.arange(1.0, 4, device=device)
    for reentrant in (False, True):
        x = logits.clone().requires_grad_()
        actual = checkpoint(token_logprobs, x, tokens, mask, use_reentrant=reentrant)
        (actual * weight).sum().backward()
        assert torch.equal(actual, expected)
        assert torch.equal(x.grad, gradient)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual, grad = run(token_logprobs, logits, tokens, mask)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(grad, gradient)


def compiled(token_logprobs) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> Tensor:
        logp, entropy = token_logprobs(x * 1.5, tokens, mask, temperature=temperature, with_entropy=True)
        return (logp - 0.1 * entropy).sum()

    return torch.compile(loss, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("changing", ["N", "temperature"])
def test_torch_compile_keeps_one_graph_for_all_values(token_logprobs, device, changing):
    """Liger #146, #1364. fullgraph=True raises on a break."""
    loss, counter = compiled(token_logprobs)
    for i in range(12):
        N, temperature = (2 + i, 0.7) if changing == "N" else (5, 1 + i / 7)
        logits, tokens, mask = make(N, 3, 9, device=device)
        x = logits.requires_grad_()
        actual = torch.autograd.grad(loss(x, tokens, mask, temperature), x)[0]
        logp, entropy = token_logprobs(x * 1.5, tokens, mask, temperature=temperature, with_entropy=True)
        expected = torch.autograd.grad((logp - 0.1 * entropy).sum(), x)[0]
        assert torch.equal(actual, expected)
    assert counter.frame_count <= 3


def test_torch_compile_keeps_all_options(token_logprobs, device):
    logits, tokens, _ = make(3, 129, device=device)
    torch._dynamo.reset()
    for options in ({}, {"inplace_backward": True}, {"temperature": 0.3}):
        function = torch.compile(
            lambda x, *args, o=options: token_logprobs(x * 1, *args, **o), backend="aot_eager", fullgraph=True
        )
        for actual, expected in zip(
            run(function, logits, tokens), run(token_logprobs, logits, tokens, **options), strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("operator", [custom_op.triton_operator, custom_op.torch_operator], ids=["triton", "torch"])
def test_the_operator_follows_the_rules_of_torch_library(monkeypatch, device, operator):
    monkeypatch.undo()  # poisoned empty tensors would differ between the fake and the real run
    logits, tokens, mask = make(3, 9, device=device)
    scalar = torch.tensor(0.7, dtype=torch.float64)
    arguments = (logits.requires_grad_(), tokens, mask, scalar, True)
    # Saved statistics of masked rows are not written, so two runs may differ there: everything is counted here.
    torch.library.opcheck(operator, (*arguments[:2], None, *arguments[3:]))


@pytest.mark.needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("V", [32000, 50257, 151936])
    def test_bf16_is_as_exact_as_eager_and_repeats(self, V):
        generator = torch.Generator("cuda").manual_seed(0)
        logits = (torch.randn(64, V, device="cuda", generator=generator) * 3).bfloat16()
        tokens = torch.randint(0, V, (64,), device="cuda", generator=generator)
        first = run(TRITON.token_logprobs, logits, tokens)
        truth = run(reference.token_logprobs, logits.double(), tokens)
        eager = run(lambda x, *args: reference.token_logprobs(x.float(), *args), logits, tokens)
        for a, e, t in zip(first, eager, truth, strict=True):
            assert (a.double() - t).abs().max() <= 2 * (e.double() - t).abs().max() + 1e-5
        for _ in range(100):
            again = run(TRITON.token_logprobs, logits, tokens)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_more_than_two_to_the_31_logits_match_the_reference(self):
        N, V = 16384, 151936
        logits = torch.empty(N, V, device="cuda", dtype=torch.bfloat16).normal_()
        tokens = torch.randint(0, V, (N,), device="cuda")
        logp, grad = run(TRITON.token_logprobs, logits, tokens)
        for rows in (slice(0, 2), slice(N - 2, N)):
            alone = TRITON.token_logprobs(logits[rows].clone(), tokens[rows])
            assert torch.equal(alone, logp[rows])
            expected = reference.token_logprobs(logits[rows].float(), tokens[rows])
            torch.testing.assert_close(logp[rows], expected, rtol=1e-4, atol=1e-4)
            p = logits[rows].float().softmax(-1)
            weight = torch.arange(1.0, N + 1, device="cuda")[rows].unsqueeze(1)
            target = weight * (torch.nn.functional.one_hot(tokens[rows], V) - p)
            torch.testing.assert_close(grad[rows].float(), target, rtol=1e-2, atol=1e-4)

    def test_peak_memory_holds_at_most_one_gradient(self):
        logits = torch.randn(4096, 32000, device="cuda", dtype=torch.bfloat16)
        tokens = torch.randint(0, 32000, (4096,), device="cuda")
        run(TRITON.token_logprobs, logits, tokens)
        for inplace, limit in ((False, 1.01), (True, 0.01)):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run(TRITON.token_logprobs, logits, tokens, inplace_backward=inplace)
            peak = torch.cuda.max_memory_allocated() - before
            assert peak <= limit * logits.nbytes + (1 << 20)


@NOT_INTERPRETED
@pytest.mark.usefixtures("values_unread")
def test_a_call_launches_one_kernel_forward_and_one_backward(monkeypatch, device):
    monkeypatch.undo()  # poisoning an empty tensor is one more launch
    logits, tokens, _ = make(4, 300, device=device)
    logits, g = logits.bfloat16().requires_grad_(), torch.ones(4, device=device)

    def run() -> None:
        torch.autograd.grad(TRITON.token_logprobs(logits, tokens), logits, g)

    names, _ = launched_by(run, device)
    kernels = sorted(name for name in names if not name.startswith("Mem"))
    assert kernels == ["token_logprobs_bwd_kernel", "token_logprobs_fwd_kernel"]
