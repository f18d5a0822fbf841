"""Tensors that are more than an address, a shape and strides: a right result or an error that names the case."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import ppo_fast as ppo
from ppo_fast import doctor
from ppo_fast.kernels.common.memory import addressable
from ppo_fast.kernels.gae import eager as eager_gae
from ppo_fast.ops import checks

CPU = torch.device("cpu")
ALL = list(doctor.CHECKS)
MASKED_LINEAR = ("linear_logprobs", "linear_ppo_loss")  # drop the rows that do not count, and need the mask's values
OPERATIONS = [getattr(ppo, name) for name in ppo.__all__ if name[0].islower()]


def inputs(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = doctor.make_inputs(device, B=3, T=9, V=103, D=16)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


class Recorded(dict[str, Tensor]):
    """Inputs that remember which of them an operation has read."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__(given)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def run(name: str, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    return tuple(doctor.CHECKS[name][0](ppo, given, **options))


def used(name: str) -> list[str]:
    """The inputs that a check reads."""
    recorded = Recorded(inputs())
    run(name, recorded)
    return list(dict.fromkeys(recorded.read))


FLOATING = [(name, x) for name in ALL for x in used(name) if inputs()[x].is_floating_point()]


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def negated(x: Tensor) -> Tensor:
    """The same numbers under a pending negation."""
    return x if x.dtype == torch.bool else torch._neg_view(x.neg())


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


# What may be read by address


class Named(Tensor):
    """A subclass that adds nothing."""


def freed() -> Tensor:
    x = torch.randn(4)
    x.untyped_storage().resize_(0)
    return x


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.randn(4)


PLAIN = {
    "a tensor": lambda: torch.randn(4),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(4)),
    "a view": lambda: torch.randn(4, 6).T[1:, ::2],
    "an expanded tensor": lambda: torch.randn(4, 1).expand(4, 3),
    "an intermediate result": lambda: 2 * torch.nn.Parameter(torch.randn(4)),
    "no elements": lambda: torch.randn(0, 3),
    "booleans": lambda: torch.ones(3, dtype=torch.bool),
}
NOT_PLAIN = {
    "negated": lambda: torch._neg_view(torch.randn(4)),
    "conjugated": lambda: torch.randn(4, dtype=torch.cfloat).conj(),
    "imaginary part of a conjugate": lambda: torch.randn(4, dtype=torch.cfloat).conj().imag,
    "efficient zeros": lambda: torch._efficientzerotensor((4,)),
    "fake": fake,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed sparse": lambda: torch.eye(3).to_sparse_csr(),
    "of MKL-DNN": lambda: torch.randn(4, 4).to_mkldnn(),
    "on another device": lambda: torch.randn(4, device="meta"),
    "of a subclass": lambda: torch.randn(4).as_subclass(Named),
    "freed": freed,
    "to be made functional": lambda: torch._to_functional_tensor(torch.randn(4)),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_plain_tensors_may_be_read_by_address(make):
    assert addressable(make())
    assert addressable(torch.zeros(1), None, make())


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_are_computed_by_pytorch(make):
    x = make()
    assert not addressable(x)
    assert not addressable(torch.zeros(1), x)


def test_nothing_is_read_by_address_while_it_is_traced_or_transformed():
    found = []

    def look(x):
        found.append(addressable(x))
        return x + 1

    x = torch.randn(4)
    for mode in ("real", "fake", "symbolic"):
        make_fx(look, tracing_mode=mode)(x)
    torch.jit.trace(look, x, check_trace=False)
    torch.func.vmap(look)(x)
    torch.func.functionalize(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.grad(lambda x: look(x).sum())(x)
    assert found == [False] * 8


@pytest.mark.parametrize("name", ALL)
def test_no_compiled_loop_is_given_memory_that_may_not_be_read_by_address(name, monkeypatch):
    cpu = pytest.importorskip("ppo_fast.kernels.gae.cpu", reason="numba is not installed")
    from ppo_fast.kernels.advantages import cpu as cpu_advantages
    from ppo_fast.kernels.loss import cpu as cpu_loss

    for module in (eager_gae, cpu_loss, cpu_advantages):
        monkeypatch.setattr(module, "addressable", lambda *_: False)
    for module in (cpu, cpu_loss, cpu_advantages):
        monkeypatch.setattr(module, "_compiled", lambda *_: pytest.fail("a compiled loop was called"))
    run(name, inputs())


# Right results


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_pending_negation_counts(name, backend, device):
    given = inputs(device)
    lazy = {key: negated(x) for key, x in given.items()}
    assert_equal(run(name, lazy, backend=backend), run(name, given, backend=backend))


@pytest.mark.parametrize("name", [name for name in ALL if doctor.CHECKS[name][1]])
def test_gradients_flow_through_a_pending_negation(name):
    expected = doctor.results(name, ppo, inputs(), torch.float32)
    given = inputs()
    leaves = [given[x].requires_grad_() for x in doctor.CHECKS[name][1]]
    outputs = run(name, {key: negated(x) for key, x in given.items()})
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y) for y in outputs]
    total = sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))
    assert_equal(torch.autograd.grad(total, leaves), tuple(expected[len(outputs) :]))


@pytest.mark.parametrize(("name", "which"), FLOATING, ids=lambda x: x)
def test_efficient_zeros_are_zeros(name, which):
    given = inputs()
    expected = run(name, given | {which: torch.zeros_like(given[which])})
    assert_equal(run(name, given | {which: torch._efficientzerotensor(given[which].shape)}), expected)


@pytest.mark.parametrize("name", ALL)
def test_the_default_device_changes_nothing(name):
    given = inputs()
    expected = run(name, given)
    with default_device("meta"):
        assert_equal(run(name, given), expected)


def test_helper_tensors_of_gae_are_on_the_cpu(monkeypatch):
    steps, rows = 1 << 20, 32
    rewards, values = torch.randn(steps), torch.randn(steps)
    cu_seqlens = torch.arange(0, steps + 1, 1024)
    by_step = rewards.view(-1, rows)[:16], values.view(-1, rows)[:16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that the packed rows are shared out
    expected = ppo.gae(rewards, values, cu_seqlens=cu_seqlens), ppo.gae(*by_step, time_major=True)
    with default_device("meta"):
        actual = ppo.gae(rewards, values, cu_seqlens=cu_seqlens), ppo.gae(*by_step, time_major=True)
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


def test_logits_in_slices_need_no_helper_on_the_default_device():
    logits, tokens = torch.randn(2, 9, 11)[:, 1:], torch.zeros(2, 8, dtype=torch.long)
    expected = ppo.token_logprobs(logits, tokens)
    with default_device("meta"):
        assert torch.equal(ppo.token_logprobs(logits, tokens), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_subclass_that_adds_nothing_counts_as_its_tensor(name):
    given = inputs()
    assert_equal(run(name, {key: x.as_subclass(Named) for key, x in given.items()}), run(name, given))


def test_the_values_of_a_subclass_are_checked():
    tokens = torch.tensor([0, 9]).as_subclass(Named)
    with pytest.raises(IndexError, match=r"must be in \[0, 5\).*got 9"):
        ppo.token_logprobs(torch.zeros(2, 5), tokens)


# Recorded


def without_mask(name: str, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A check, of the linear operations without their mask."""
    if name not in MASKED_LINEAR:
        return run(name, given)
    if name == "linear_logprobs":
        return ppo.linear_logprobs(given["hidden"], given["weight"], given["tokens"], with_entropy=True)
    names = ("hidden", "weight", "tokens", "old_logprobs", "advantages")
    return (ppo.linear_ppo_loss(*(given[x] for x in names), entropy_coef=0.01, softcap=5.0).loss,)


def as_function(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[str]]:
    """A check as a function of its tensors, and their names."""
    names = used(name)
    return lambda *tensors: without_mask(name, dict(zip(names, tensors, strict=True))), names


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_what_is_computed(name, mode):
    function, names = as_function(name)
    given = inputs()
    others = {key: x.flip(0).contiguous() if x.ndim > 1 else x for key, x in given.items()}
    graph = make_fx(function, tracing_mode=mode)(*(given[x] for x in names))
    expected = without_mask(name, others)
    for a, b in zip(graph(*(others[x] for x in names)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_fake_tensors_give_fake_results_of_the_same_shape_and_dtype(name):
    given = inputs()
    expected = without_mask(name, given)
    with FakeTensorMode() as mode:
        actual = without_mask(name, {key: mode.from_tensor(x) for key, x in given.items()})
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize("name", MASKED_LINEAR)
def test_a_mask_without_values_is_an_error_of_the_linear_operations(name):
    with FakeTensorMode() as mode, pytest.raises(NotImplementedError, match="mask is not supported under make_fx"):
        run(name, {key: mode.from_tensor(x) for key, x in inputs().items()})


@pytest.mark.parametrize("name", ALL)
def test_triton_is_an_error_where_launches_are_not_recorded(name):
    message = "backend='triton' cannot run under make_fx or FakeTensorMode"
    with FakeTensorMode() as mode, pytest.raises((RuntimeError, NotImplementedError), match=f"{message}|mask is not"):
        run(name, {key: mode.from_tensor(x) for key, x in inputs().items()}, backend="triton")


@pytest.mark.parametrize("name", ALL)
def test_jit_trace_is_an_error(name):
    function, names = as_function(name)
    with pytest.raises(NotImplementedError, match=f"{operation(name)}: torch.jit.trace is not supported"):
        torch.jit.trace(function, tuple(inputs()[x] for x in names), check_trace=False)


# Transforms, tangents and gradients that are not computed


def operation(name: str) -> str:
    return name.partition(",")[0]


@pytest.mark.parametrize("name", ALL)
def test_transforms_of_torch_func_are_an_error_that_names_them(name):
    function, names = as_function(name)
    tensors = tuple(inputs()[x] for x in names)
    floats = tuple(x for x in tensors if x.is_floating_point())
    rest = {i: x for i, x in enumerate(tensors) if not x.is_floating_point()}

    def of_floats(*given: Tensor) -> Tensor:
        remaining = iter(given)
        return function(*(rest[i] if i in rest else next(remaining) for i in range(len(tensors))))[0].sum()

    message = rf"{operation(name)}: \w+ is a tensor of torch.func \({{}}\), which is not supported"
    with pytest.raises(NotImplementedError, match=message.format("vmap")):
        torch.func.vmap(of_floats)(*(torch.stack([x, x]) for x in floats))
    with pytest.raises(NotImplementedError, match=message.format("grad, vjp or jvp")):
        torch.func.jvp(of_floats, floats, floats)
    with pytest.raises(NotImplementedError, match=message.format("grad, vjp or jvp")):
        torch.func.grad(of_floats)(*floats)
    with pytest.raises(NotImplementedError, match=message.format("functionalize")):
        torch.func.functionalize(of_floats)(*floats)


@pytest.mark.parametrize(("name", "which"), FLOATING, ids=lambda x: x)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tangent_is_an_error_that_names_its_argument(name, which, backend):
    with forward_ad.dual_level():
        given = inputs()
        dual = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
        with pytest.raises(NotImplementedError, match=rf"{operation(name)}: \w+ has a tangent, and forward-mode AD"):
            run(name, given | {which: dual}, backend=backend)


@pytest.mark.parametrize("name", ALL)
def test_tensors_without_a_tangent_pass_through_a_dual_level(name):
    given = inputs()
    expected = run(name, given)
    with forward_ad.dual_level():
        assert_equal(run(name, given), expected)


def test_forward_mode_is_an_error_in_compiled_code():
    compiled = torch.compile(lambda x: ppo.masked_whiten(x), backend="eager")
    x = torch.randn(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"masked_whiten: .*forward-mode AD is not supported"):
            compiled(dual)


VALUES = {"denominator": 20.0, "dual_clip": 3.0, "gamma": 0.9, "lam": 0.8, "norm_length": 4.0}


class WithOptions:
    """ppo_fast with further options, where an operation has them."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(ppo, name)
        known = inspect.signature(function).parameters
        return lambda *args, **kwargs: function(
            *args, **{**kwargs, **{key: x for key, x in self.options.items() if key in known}}
        )


def with_option(name: str, option: str, value: Any) -> tuple[Tensor, ...]:
    extra: dict[str, Any] = {"aggregation": "seq-mean-token-sum-norm"} if option == "norm_length" else {}
    given = inputs()
    if name in ("policy_loss", "linear_ppo_loss"):
        extra |= {key: given[key] for key in ("entropy", "ref_logprobs")}
    return tuple(doctor.CHECKS[name][0](WithOptions(**{option: value}, **extra), given))


NUMBERS = [
    (name, option)
    for name in ALL
    for option in inspect.signature(getattr(ppo, operation(name))).parameters
    if option in checks.OPTIONS
]


def test_every_option_that_is_a_number_is_known_as_a_constant():
    not_tensors = {"chunk_bytes", "num_counted"}
    for function in OPERATIONS:
        for name, parameter in inspect.signature(function).parameters.items():
            if "float" in str(parameter.annotation) or "int" in str(parameter.annotation).split(" | "):
                assert name in checks.OPTIONS | not_tensors, f"{name} of {function.__name__}"


@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=lambda x: x)
def test_an_option_that_requires_a_gradient_is_an_error_that_names_it(name, option):
    learned = torch.tensor(VALUES.get(option, 0.7), requires_grad=True)
    with pytest.raises(TypeError, match=f"{operation(name)}: {option} is a constant and gets no gradient"):
        with_option(name, option, learned)


def test_a_learned_option_is_an_error_in_compiled_code():
    logits, tokens = torch.randn(4, 7), torch.zeros(4, dtype=torch.long)
    temperature = torch.nn.Parameter(torch.tensor(0.7))
    compiled = torch.compile(lambda t: ppo.token_logprobs(logits, tokens, temperature=t), backend="eager")
    with pytest.raises(TypeError, match="token_logprobs: temperature is a constant"):
        compiled(temperature)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=lambda x: x)
def test_a_number_may_be_a_tensor_or_of_numpy(name, option):
    value = VALUES.get(option, 0.7)
    expected = with_option(name, option, value)
    for given in (torch.tensor(value), torch.tensor(value, dtype=torch.float64), np.float32(value), np.float64(value)):
        for a, b in zip(with_option(name, option, given), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(with_option(name, option, torch.nn.Parameter(torch.tensor(value))), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_data_with_a_graph_are_constants():
    x = torch.randn(2, 5, requires_grad=True)
    logprobs = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ppo.policy_loss(logprobs, x, x, weights=x, ref_logprobs=x).loss, logprobs)
    plain = x.detach()
    expected = ppo.policy_loss(logprobs, plain, plain, weights=plain, ref_logprobs=plain).loss
    assert torch.equal(gradient, torch.autograd.grad(expected, logprobs)[0])
    for result in (*ppo.gae(x, x), ppo.masked_whiten(x)):
        assert not result.requires_grad


# Distributed


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dtensor_is_an_error_that_names_it(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    given = inputs()
    for which in used(name):
        sharded = given | {which: distribute_tensor(given[which], mesh, [Shard(0)])}
        with pytest.raises(TypeError, match=rf"{operation(name)}: \w+ is a .*DTensor .* must be a plain tensor"):
            run(name, sharded)


TENSOR_OPTIONS = {
    "temperature": 1.3,
    "softcap": 2.0,
    "logit_scale": 0.7,
    "clip_low": 0.05,
    "clip_high": 0.05,
    "dual_clip": 1.1,
    "log_ratio_clamp": 0.1,
    "entropy_coef": 0.5,
    "kl_coef": 0.5,
    "denominator": 7.0,
    "norm_length": 3.0,
}


@pytest.mark.parametrize("name", TENSOR_OPTIONS)
def test_an_option_in_a_tensor_has_its_value_in_compiled_code(name):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(31, 8, generator=generator)
    tokens = torch.randint(0, 31, (2, 5), generator=generator)
    old, advantages, ref = torch.randn(3, 2, 5, generator=generator) - torch.tensor([5.0, 0.0, 3.0]).view(3, 1, 1)
    fixed = {"ref_logprobs": ref} | ({"aggregation": "seq-mean-token-sum-norm"} if name == "norm_length" else {})

    def loss(**option):
        return ppo.linear_ppo_loss(hidden, weight, tokens, old, advantages, **fixed, **option).loss

    expected = loss(**{name: TENSOR_OPTIONS[name]})
    assert expected != loss(), "the option has no effect on these inputs"
    compiled = torch.compile(lambda x: loss(**{name: x}), backend="eager")
    torch.testing.assert_close(compiled(torch.tensor(TENSOR_OPTIONS[name])), expected)
