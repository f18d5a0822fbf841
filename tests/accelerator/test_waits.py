"""Each operation for which the host waits on CUDA is recorded once, with its line; others are not recorded."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerator.waits import record_waits
from torch import Tensor

WAITING: dict[str, tuple[Callable[[Tensor], object], list[str]]] = {
    "item": (lambda a: a.sum().item(), ["item"]),
    "float": (lambda a: float(a.sum()), ["item"]),
    "int": (lambda a: int(a.sum()), ["item"]),
    "bool": (lambda a: bool((a > 0).any()), ["item"]),
    "if": (lambda a: 1 if a.sum() > 0 else 0, ["item"]),
    "tolist": (lambda a: a.tolist(), ["copy to host"]),
    "cpu": (lambda a: a.cpu(), ["copy to host"]),
    "to cpu": (lambda a: a.to("cpu"), ["copy to host"]),
    "copy_ to the cpu": (lambda a: torch.empty(4, 5).copy_(a), ["copy to host"]),
    "copy_ to pageable memory, non_blocking": (
        lambda a: torch.empty(4, 5).copy_(a, non_blocking=True),
        ["copy to host"],
    ),
    "nonzero": (lambda a: a.nonzero(), ["shape"]),
    "where without values": (lambda a: torch.where(a > 0), ["shape"]),
    "boolean index": (lambda a: a[a > 0], ["shape"]),
    "two boolean indices": (lambda a: a[a[:, 0] > 0.4, a[0, :5] > -1], ["shape", "shape"]),
    "boolean index_put": (lambda a: a.index_put_((a > 0,), a.new_tensor(1.0)), ["copy to device", "shape"]),
    "masked_select": (lambda a: a.masked_select(a > 0), ["shape"]),
    "unique": (lambda a: a.unique(), ["shape"]),
    "equal": (lambda a: torch.equal(a, a + 1), ["value"]),
    "allclose": (lambda a: torch.allclose(a, a + 1), ["item"]),
    "repeat_interleave": (
        lambda a: a.repeat_interleave(torch.ones(4, dtype=torch.int64, device=a.device), 0),
        ["shape", "shape"],
    ),
    "torch.tensor": (lambda a: torch.tensor([1.0, 2.0], device=a.device), ["copy to device"]),
    "to": (lambda a: torch.ones(3).to(a.device), ["copy to device"]),
    "to, non_blocking, from pageable memory": (
        lambda a: torch.ones(3).to(a.device, non_blocking=True),
        ["copy to device"],
    ),
    "to, from pinned memory": (lambda a: torch.ones(3).pin_memory().to(a.device), ["copy to device"]),
    "to, non_blocking, from a strided view of pinned memory": (
        lambda a: torch.ones(3, 2).pin_memory()[:, 0].to(a.device, non_blocking=True),
        ["copy to device"],
    ),
    "cpu index": (lambda a: a[torch.tensor([0, 2])], ["copy to device"]),
    "index_put of a cpu number": (
        lambda a: a.index_put_((torch.zeros(1, dtype=torch.int64, device=a.device),), torch.tensor(1.0)),
        ["copy to device"],
    ),
    "where with a cpu number": (lambda a: torch.where(a > 0, a, torch.tensor(0.0)), ["copy to device"]),
    "a slice up to a tensor": (lambda a: a[: a.argmax() * 0 + 2], ["item"]),
    "a row at a 0-dim tensor": (lambda a: a[a.argmax() * 0], ["item"]),
    "synchronize": (lambda a: torch.testgpu.synchronize(a.device), ["synchronize"]),
}


def matrix(device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, 20, device=device).view(4, 5)


@pytest.mark.parametrize(("operation", "kinds"), WAITING.values(), ids=WAITING)
def test_a_wait_is_recorded_with_its_line(operation: Callable, kinds: list[str], testgpu: torch.device) -> None:
    a = matrix(testgpu)
    with record_waits() as waits:
        operation(a)
    assert [wait.kind for wait in waits] == kinds
    first = inspect.getsourcelines(operation)[1]
    lines = range(first, first + 4)
    assert {wait.place for wait in waits} <= {f"{Path(__file__).name}:{line}" for line in lines}
    assert {(wait.owner, wait.caller) for wait in waits} == {("test", "")}


LAUNCHED: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda a: (a + 1).exp().sum() / 3,
    "matmul": lambda a: a @ a.T,
    "masked_fill": lambda a: a.masked_fill(a > 0, 0.0),
    "where": lambda a: torch.where(a > 0, a, 0.0),
    "0-dim cpu tensor": lambda a: a * torch.tensor(2.0),
    "fill": lambda a: torch.full((3,), 2.0, device=a.device),
    "arange": lambda a: torch.arange(9, device=a.device),
    "integer index": lambda a: a[torch.zeros(2, dtype=torch.int64, device=a.device)],
    "row": lambda a: a[2],
    "gather": lambda a: a.gather(1, torch.zeros(4, 1, dtype=torch.int64, device=a.device)),
    "masked_scatter": lambda a: a.masked_scatter(a > 0, a),
    "multinomial": lambda a: a.softmax(-1).multinomial(1),
    "topk": lambda a: a.topk(2),
    "sort": lambda a: a.sort(-1),
    "cumsum": lambda a: a.cumsum(1),
    "nonzero_static": lambda a: torch.nonzero_static(a, size=3),
    "repeat_interleave with output_size": lambda a: torch.repeat_interleave(
        torch.ones(4, dtype=torch.int64, device=a.device), output_size=4
    ),
    "other dtype": lambda a: a.to(torch.bfloat16),
    "other device": lambda a: a.to("testgpu:1"),
    "non_blocking to pinned memory": lambda a: a.to("cpu", non_blocking=True),
    "non_blocking copy_ to pinned memory": lambda a: torch.empty(4, 5, pin_memory=True).copy_(a, non_blocking=True),
    "non_blocking from pinned memory": lambda a: torch.ones(3).pin_memory().to(a.device, non_blocking=True),
    "an empty copy": lambda a: torch.ones(0).to(a.device).cpu(),
    "backward": lambda a: a.clone().requires_grad_().square().sum().backward(),
    "the generator's state": lambda a: torch.testgpu.set_rng_state(torch.testgpu.get_rng_state(a.device), a.device),
}


@pytest.mark.parametrize("operation", LAUNCHED.values(), ids=LAUNCHED)
def test_an_operation_that_is_only_launched_is_no_wait(operation: Callable, testgpu: torch.device) -> None:
    a = matrix(testgpu)
    with record_waits() as waits:
        operation(a)
    assert not waits, str(waits)


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float(grad.sum())


def test_a_wait_in_the_thread_of_autograd_has_its_line(testgpu: torch.device) -> None:
    out = _Reads.apply(matrix(testgpu).requires_grad_()).sum()
    with record_waits() as waits:
        out.backward()
    lines, first = inspect.getsourcelines(_Reads.backward)
    assert [wait.place for wait in waits] == [f"test_waits.py:{first + len(lines) - 1}"]


def test_a_wait_of_a_kernel_in_backward_has_the_line_of_the_call(testgpu: torch.device) -> None:
    mask = matrix(testgpu) > 0
    out = matrix(testgpu).requires_grad_()[mask].sum()  # backward is an index_put_ with a mask
    with record_waits() as waits:
        out.backward()  # here
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("  # here"))
    assert {wait.place for wait in waits} == {f"test_waits.py:{line}"}


def test_waits_belong_to_the_package_whose_line_is_innermost(testgpu: torch.device) -> None:
    from support.tiny import tiny_llama

    from ppo_fast.kernels.linear.chunks import counted_rows

    model = tiny_llama(258).to(testgpu)
    ids = torch.ones(2, 5, dtype=torch.int64, device=testgpu)
    with record_waits() as waits:
        counted_rows(ids > 0, None, 10)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert [wait.place.split(":")[0] for wait in waits.of("ppo_fast")] == ["kernels/linear/chunks.py"]
    assert waits.called_from("kernels/linear/chunks.py") == waits.of("ppo_fast")
    assert {wait.place.split(":")[0] for wait in waits.of("transformers")} >= {"generation/utils.py"}
    assert len(waits.of("ppo_fast")) + len(waits.of("transformers")) == len(waits)
    assert "generation/utils.py" in str(waits)
    assert sum(waits.by_place().values()) == len(waits)


def test_an_inner_block_keeps_its_own_waits(testgpu: torch.device) -> None:
    a = matrix(testgpu)
    with record_waits() as outer:
        a.cpu()
        with record_waits() as inner:
            a.tolist()
            a.sum().item()
        a.nonzero()
    a.cpu()
    assert [wait.kind for wait in inner] == ["copy to host", "item"]
    assert [wait.kind for wait in outer] == ["copy to host", "shape"]
