"""The test device: it rejects what CUDA rejects, allows what CUDA allows, and its numbers are those of the CPU."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

TWO_DEVICES = "same device|too many CPU scalars|two devices|expected device|have testgpu:0 Device|indices should be"


def matrix(device: torch.device | str) -> Tensor:
    """[4, 5], the same numbers on each device."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device)


# Each gets a matrix on the test device and the same one on another device, the CPU or the second test device.
REJECTED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda a, b: a + b,
    "add from the right": lambda a, b: b + a,
    "add_": lambda a, b: a.add_(b),
    "add_ to the other": lambda a, b: b.add_(a),
    "add_ of a number to the other": lambda a, b: b.sum().add_(a.sum()),
    "add into the other": lambda a, b: torch.add(a, a, out=b),
    "add of three": lambda a, b: torch.addcmul(a, a, b),
    "lerp": lambda a, b: a.lerp(a, b),
    "comparison": lambda a, b: a < b,
    "equal": lambda a, b: torch.equal(a, b),
    "matmul": lambda a, b: a @ b.T,
    "matmul from the right": lambda a, b: b @ a.T,
    "linear": lambda a, b: F.linear(a, b),
    "linear bias": lambda a, b: F.linear(a, a, b[:, 0]),
    "bmm": lambda a, b: a[None] @ b.T[None],
    "dot with a vector": lambda a, b: a[0].dot(b[0]),
    "baddbmm": lambda a, b: torch.baddbmm(b[None, :, :4], a[None], a.T[None]),
    "cat": lambda a, b: torch.cat([a, b]),
    "cat of one element": lambda a, b: torch.cat([a[0], b[0, :1]]),
    "stack": lambda a, b: torch.stack([a, b]),
    "stack of numbers": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where with its condition": lambda a, b: torch.where(b > 0, a, a),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 0.0),
    "masked_fill of the other": lambda a, b: b.masked_fill(a > 0, 0.0),
    "masked_select": lambda a, b: a.masked_select(b > 0),
    "index of the other": lambda a, b: b[torch.zeros(2, dtype=torch.int64, device=a.device)],
    "index_put of a row": lambda a, b: a.index_put_((torch.tensor([0], device=a.device),), b[0]),
    "index_select": lambda a, b: a.index_select(0, torch.zeros(2, dtype=torch.int64, device=b.device)),
    "index_add": lambda a, b: a.index_add(0, torch.zeros(4, dtype=torch.int64, device=a.device), b),
    "index_copy": lambda a, b: a.index_copy(0, torch.zeros(4, dtype=torch.int64, device=b.device), a),
    "gather": lambda a, b: a.gather(1, torch.zeros(4, 1, dtype=torch.int64, device=b.device)),
    "scatter": lambda a, b: a.scatter(1, torch.zeros(4, 1, dtype=torch.int64, device=b.device), a),
    "take_along_dim": lambda a, b: a.take_along_dim(torch.zeros(4, 1, dtype=torch.int64, device=b.device), 1),
    "embedding": lambda a, b: F.embedding(torch.zeros(2, dtype=torch.int64, device=b.device), a),
    "cross_entropy": lambda a, b: F.cross_entropy(a, torch.zeros(4, dtype=torch.int64, device=b.device)),
    "mse_loss": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "layer_norm": lambda a, b: F.layer_norm(a, (5,), b[0]),
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None]),
    "searchsorted": lambda a, b: torch.searchsorted(a[0].sort().values, b[0]),
    "repeat_interleave": lambda a, b: a.repeat_interleave(torch.ones(4, dtype=torch.int64, device=b.device), 0),
    "conv2d": lambda a, b: F.conv2d(a[None, None], b[None, None]),
    "foreach_add": lambda a, b: torch._foreach_mul([a], [b]),
    "backward with the other's gradient": lambda a, b: a.clone().requires_grad_().exp().backward(b),
}


@pytest.mark.parametrize("operation", REJECTED.values(), ids=REJECTED)
def test_an_operation_with_a_cpu_tensor_raises(operation: Callable, testgpu: torch.device) -> None:
    with pytest.raises((RuntimeError, IndexError), match=TWO_DEVICES):
        operation(matrix(testgpu), matrix("cpu"))


@pytest.mark.parametrize("operation", REJECTED.values(), ids=REJECTED)
def test_an_operation_with_a_tensor_of_the_second_device_raises(
    operation: Callable, testgpu: torch.device, second_testgpu: torch.device
) -> None:
    with pytest.raises((RuntimeError, IndexError), match=TWO_DEVICES):
        operation(matrix(testgpu), matrix(second_testgpu))


# The same on one device, so that nothing above raises for another reason.
@pytest.mark.parametrize("operation", REJECTED.values(), ids=REJECTED)
def test_an_operation_on_one_device_gives_the_numbers_of_the_cpu(operation: Callable, testgpu: torch.device) -> None:
    on_device, on_cpu = (operation(matrix(x), matrix(x)) for x in (testgpu, "cpu"))
    for ours, theirs in zip(as_list(on_device), as_list(on_cpu), strict=True):
        if isinstance(ours, Tensor):
            assert ours.device == testgpu
            ours = ours.cpu()
        # The same kernels, but attention takes the math path here and a fused one on the CPU.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def as_list(result: object) -> list:
    if result is None:
        return []
    return list(result) if isinstance(result, list | tuple) else [result]


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda a: a + torch.tensor(2.0),
    "add from the right": lambda a: torch.tensor(2.0) + a,
    "mul_": lambda a: a.mul_(torch.tensor(2.0)),
    "comparison": lambda a: a < torch.tensor(0.5),
    "where": lambda a: torch.where(a > 0, torch.tensor(1.0), a),
    "where with two numbers": lambda a: torch.where(a > 0, torch.tensor(1.0), torch.tensor(0.0)),
    "maximum": lambda a: a.maximum(torch.tensor(0.1)),
    "pow": lambda a: a.pow(torch.tensor(2.0)),
    "masked_fill": lambda a: a.masked_fill(a > 0, torch.tensor(7.0)),
    "fill_": lambda a: a.fill_(torch.tensor(7.0)),
    "index_fill": lambda a: a.index_fill(0, torch.tensor([1], device=a.device), torch.tensor(7.0)),
    "cpu index": lambda a: a[torch.tensor([2, 0])],
    "cpu indices": lambda a: a[torch.tensor([2, 0]), torch.tensor([1, 1])],
    "cpu mask": lambda a: a[torch.tensor([True, False, True, False])],
    "index_put at a cpu index": lambda a: a.index_put_((torch.tensor([1]),), torch.tensor(7.0)),
    "index_put of a row at a cpu index": lambda a: a.index_put_((torch.tensor([1]),), a[:1].clone()),
    "setitem of a cpu number": lambda a: a.index_put_((a > 0,), torch.tensor(7.0)),
    "copy_": lambda a: a.copy_(torch.ones(4, 5)),
}


@pytest.mark.parametrize("operation", ALLOWED.values(), ids=ALLOWED)
def test_cpu_numbers_and_cpu_indices_are_allowed_where_cuda_allows_them(
    operation: Callable, testgpu: torch.device
) -> None:
    result = operation(matrix(testgpu))
    assert result.device == testgpu
    torch.testing.assert_close(result.cpu(), operation(matrix("cpu")), rtol=0, atol=0)


NUMBERS_REJECTED: dict[str, Callable[[Tensor], object]] = {
    "written": lambda a: torch.tensor(2.0).add_(a.sum()),
    "two of three": lambda a: torch.addcmul(a, torch.tensor(2.0), torch.tensor(2.0)),
    "index_select": lambda a: a.index_select(0, torch.tensor(0)),
    "gather": lambda a: a.sum().gather(0, torch.tensor(0)),
    "stack": lambda a: torch.stack([torch.tensor(2.0), a.sum()]),
    "embedding": lambda a: F.embedding(torch.tensor(0), a),
    "cross_entropy": lambda a: F.cross_entropy(a[0], torch.tensor(0)),
}


@pytest.mark.parametrize("operation", NUMBERS_REJECTED.values(), ids=NUMBERS_REJECTED)
def test_cpu_numbers_are_rejected_where_cuda_rejects_them(operation: Callable, testgpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match=TWO_DEVICES):
        operation(matrix(testgpu))


def test_numpy_is_rejected(testgpu: torch.device) -> None:
    with pytest.raises(TypeError, match="can't convert"):
        matrix(testgpu).numpy()


RANDOM: dict[str, Callable[[torch.device, torch.Generator | None], Tensor]] = {
    "rand": lambda device, g: torch.rand(5, device=device, generator=g),
    "randn": lambda device, g: torch.randn(5, device=device, generator=g),
    "randint": lambda device, g: torch.randint(9, (5,), device=device, generator=g),
    "randperm": lambda device, g: torch.randperm(5, device=device, generator=g),
    "normal_": lambda device, g: torch.empty(5, device=device).normal_(generator=g),
    "bernoulli": lambda device, g: torch.full((5,), 0.5, device=device).bernoulli(generator=g),
    "multinomial": lambda device, g: torch.ones(5, device=device).multinomial(3, generator=g),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_generators_of_another_device_are_rejected(draw: Callable, testgpu: torch.device) -> None:
    for wrong in ("cpu", "testgpu:1"):
        with pytest.raises(RuntimeError, match="device for generator"):
            draw(testgpu, torch.Generator(wrong))
    with pytest.raises(RuntimeError, match=r"for generator|same device"):
        draw(torch.device("cpu"), torch.Generator(testgpu))


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_equal_seeds_give_the_samples_of_the_cpu(draw: Callable, testgpu: torch.device) -> None:
    for name in ("testgpu:0", "testgpu:1"):
        generator = torch.Generator(name).manual_seed(5)
        expected = torch.Generator().manual_seed(5)
        for _ in range(2):  # the second draw continues
            assert draw(torch.device(name), generator).tolist() == draw(torch.device("cpu"), expected).tolist()


def test_each_device_has_a_default_generator(testgpu: torch.device, second_testgpu: torch.device) -> None:
    torch.manual_seed(3)
    first, second = torch.rand(4, device=testgpu), torch.rand(4, device=second_testgpu)
    assert first.tolist() == second.tolist()
    states = [torch.testgpu.get_rng_state(i) for i in (0, 1)]
    torch.rand(4, device=second_testgpu)
    assert torch.equal(torch.testgpu.get_rng_state(0), states[0])
    assert not torch.equal(torch.testgpu.get_rng_state(1), states[1])
    torch.testgpu.set_rng_state(states[1], second_testgpu)
    assert torch.equal(torch.testgpu.get_rng_state("testgpu:1"), states[1])


def test_fork_rng_restores_both_devices(testgpu: torch.device) -> None:
    states = [torch.testgpu.get_rng_state(i) for i in (0, 1)]
    with torch.random.fork_rng(devices=range(2), device_type="testgpu"):
        torch.manual_seed(8)
        torch.rand(2, device="testgpu:1")
    assert all(torch.equal(torch.testgpu.get_rng_state(i), state) for i, state in enumerate(states))


def test_a_device_without_an_index_is_the_current_one(testgpu: torch.device) -> None:
    assert torch.zeros(1, device="testgpu").device.index == 0
    with torch.testgpu.device("testgpu:1"):
        assert torch.testgpu.current_device() == 1
        assert torch.zeros(1, device="testgpu").device.index == 1
        assert torch.zeros(1).to("testgpu").device.index == 1
    assert torch.testgpu.current_device() == 0


def test_results_are_on_the_device_of_the_tensors_when_another_one_is_current(second_testgpu: torch.device) -> None:
    a = matrix(second_testgpu).requires_grad_()
    results = [a + 1, a @ a.T, a[:, 1], a.argmax(1), F.softmax(a, -1), a.new_zeros(2), torch.empty_like(a), a[a > 0]]
    results += [a.to(torch.bfloat16), torch.cat([a, a]), *a.split(2), *a.topk(2)]
    results.append(torch.autograd.grad(a.square().sum(), a)[0])
    assert {x.device for x in results} == {second_testgpu}
    assert torch.testgpu.current_device() == 0


def test_a_third_device_does_not_exist(testgpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.zeros(1, device="testgpu:2")


def test_new_memory_is_nan(testgpu: torch.device) -> None:
    assert torch.empty(7, device=testgpu).isnan().all()
    assert torch.empty_like(matrix(testgpu), dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(7, device=testgpu, dtype=torch.int64) == -1).all()


def test_memory_is_counted_for_each_device(testgpu: torch.device, second_testgpu: torch.device) -> None:
    module = torch.testgpu
    before = [module.memory_allocated(i) for i in (0, 1)]
    module.reset_peak_memory_stats(second_testgpu)
    a = torch.zeros(1000, device=second_testgpu)
    b = a + a  # a result of a kernel counts, too
    assert [module.memory_allocated(i) for i in (0, 1)] == [before[0], before[1] + 8000]
    c = b[10:]  # a view has no memory of its own, and keeps that of its base
    del a, b
    assert module.memory_allocated(second_testgpu) == before[1] + 4000
    assert module.max_memory_allocated(second_testgpu) == before[1] + 8000
    module.reset_peak_memory_stats(second_testgpu)
    assert module.max_memory_allocated(second_testgpu) == before[1] + 4000
    del c
    assert module.memory_allocated(second_testgpu) == before[1]


def test_allocations_are_counted_for_each_device(testgpu: torch.device, second_testgpu: torch.device) -> None:
    def allocations(device: torch.device) -> int:
        return torch.testgpu.memory_stats(device)["allocation.all.allocated"]

    first, second = allocations(testgpu), allocations(second_testgpu)
    torch.zeros(3, device=second_testgpu).exp()
    assert (allocations(testgpu), allocations(second_testgpu)) == (first, second + 2)


def test_views_share_memory(testgpu: torch.device) -> None:
    a = torch.zeros(4, 6, device=testgpu)
    a.T[2].add_(1)
    a.view(2, 12)[0, :3] = 5.0
    a.unflatten(1, (2, 3))[3].unbind(0)[1].fill_(7.0)
    b = torch.zeros(4, 6)
    b.T[2].add_(1)
    b.view(2, 12)[0, :3] = 5.0
    b.unflatten(1, (2, 3))[3].unbind(0)[1].fill_(7.0)
    assert torch.equal(a.cpu(), b)


def test_pinned_memory_is_recognised(testgpu: torch.device) -> None:
    a = torch.arange(6.0).view(2, 3)
    assert not a.is_pinned()
    assert a.pin_memory().is_pinned()
    assert a.pin_memory()[1:].is_pinned()
    assert torch.equal(a.pin_memory(), a)
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert matrix(testgpu).to("cpu", non_blocking=True).is_pinned()  # as on CUDA


def model(device: torch.device | str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.GELU(), torch.nn.Linear(7, 2)]
    return torch.nn.Sequential(*layers).to(device)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_training_gives_the_weights_of_the_cpu(options: dict[str, bool], testgpu: torch.device) -> None:
    trained = []
    for device in (testgpu, "cpu"):
        m = model(device)
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            m(matrix(device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
        trained.append(m)
    for ours, theirs in zip(*(m.parameters() for m in trained), strict=True):
        assert ours.device == testgpu
        assert torch.equal(ours.detach().cpu(), theirs.detach())


def test_modules_keep_their_parameters_when_they_move(testgpu: torch.device) -> None:
    m = model("cpu")
    parameters = list(m.parameters())
    m.to(testgpu)
    assert all(a is b for a, b in zip(m.parameters(), parameters, strict=True))
    copied = copy.deepcopy(m)
    assert next(copied.parameters()).device == testgpu
    assert next(copied.parameters()).data_ptr() != next(m.parameters()).data_ptr()


def test_autocast_takes_the_dtypes_of_cuda(testgpu: torch.device) -> None:
    m = model(testgpu)
    with torch.autocast("testgpu", dtype=torch.bfloat16):
        out = m(matrix(testgpu))
        assert out.dtype == torch.bfloat16
        for name in ("softmax", "log_softmax"):
            assert getattr(out, name)(-1).dtype == torch.float32
        assert out.sum().dtype == out.exp().dtype == out.norm().dtype == torch.float32
        assert F.layer_norm(out, (2,)).dtype == torch.float32
        assert (out + matrix(testgpu)[:, :2]).dtype == torch.float32
        assert out.relu().dtype == torch.bfloat16
        assert F.scaled_dot_product_attention(*[matrix(testgpu)[None]] * 3).dtype == torch.bfloat16
    assert m(matrix(testgpu)).dtype == torch.float32
    out.float().sum().backward()
    assert m[0].weight.grad.dtype == torch.float32


def test_tensors_are_saved_and_loaded(testgpu: torch.device, second_testgpu: torch.device, tmp_path) -> None:
    torch.save({"a": matrix(second_testgpu)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["a"].device == second_testgpu
    assert torch.equal(torch.load(tmp_path / "a.pt", map_location="cpu")["a"], matrix("cpu"))


def test_gradient_checkpointing_restores_the_generator(testgpu: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recomputed in (False, True):
        a = matrix(testgpu).requires_grad_()
        torch.manual_seed(4)
        function = lambda x: F.dropout(x, 0.5).square()  # noqa: E731
        out = checkpoint(function, a, use_reentrant=False) if recomputed else function(a)
        torch.rand(3, device=testgpu)
        out.sum().backward()
        gradients.append(a.grad.cpu())
    assert torch.equal(*gradients)
