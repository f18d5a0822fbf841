"""Random calls of the public operations, of every kind that their launchers distinguish.

A call is determined by its number, so that a call found in one process can be repeated in another.
"""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ppo_fast as ppo

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
Call = Callable[[str], list[Tensor]]  # of a backend


class Inputs:
    """Random tensors and choices."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choose(self, *values: Any) -> Any:
        return self.random.choice(values)

    def strided(self, make: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """A tensor with the strides of a slice, a transposition or an expansion, or without gaps."""
        kinds = ("plain", "plain", "plain", "plain", "rows", "padded", "padded", "columns", "offset")
        kind = self.choose(*kinds, "every other", "transposed", "expanded")
        *outer, last = shape
        if kind == "rows" and outer:
            return make((*outer[:-1], outer[-1] + 1, last))[..., 1:, :]
        if kind == "padded":
            return make((*outer, -(-last // 16) * 16))[..., :last]
        if kind == "columns":
            return make((*outer, last + 3))[..., :last]
        if kind == "offset":
            return make((*outer, last + 1))[..., 1:]
        if kind == "every other":
            return make((*outer, 2 * last))[..., ::2]
        if kind == "transposed" and outer:
            return make((*outer[:-1], last, outer[-1])).transpose(-1, -2)
        if kind == "expanded" and outer:
            return make((*outer[:-1], 1, last)).expand(shape)
        return make(shape)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return self.strided(lambda size: (scale * torch.randn(size, generator=self.generator)).to(dtype), shape)

    def mask(self, shape: tuple[int, ...], share: float = 0.7) -> Tensor:
        return self.strided(lambda size: torch.rand(size, generator=self.generator) < share, shape)

    def maybe_mask(self, shape: tuple[int, ...]) -> Tensor | None:
        return self.mask(shape) if self.chance(0.6) else None

    def tokens(self, shape: tuple[int, ...], size: int) -> Tensor:
        dtype = self.choose(torch.int64, torch.int64, torch.int32)
        return self.strided(lambda s: torch.randint(0, size, s, generator=self.generator).to(dtype), shape)

    def boundaries(self, total: int) -> Tensor:
        cuts = sorted(self.random.randint(0, total) for _ in range(self.random.randint(0, 4)))
        return torch.tensor([0, *cuts, total], dtype=self.choose(torch.int32, torch.int64))


def with_gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed combination of them."""
    wanted = [x for x in leaves if x.requires_grad]
    graph = [x for x in outputs if x.requires_grad]
    if not wanted or not graph:
        return [x.detach() for x in outputs]
    total = sum((x * (0.3 + 0.1 * i)).sum() for i, x in enumerate(graph))
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [x.detach() for x in outputs] + [g for g in gradients if g is not None]


def leaf(x: Tensor | None, needed: bool) -> Tensor | None:
    return x.detach().requires_grad_() if x is not None and needed else x


def token_logprobs(r: Inputs) -> Call:
    V = r.choose(1, 5, 64, 100, 128, 1000, 1024, 2048, 4097, 4099, 6001, 8192, 9001)
    rows = r.choose((1,), (3,), (2, 2), (1, 3))
    logits = r.normal((*rows, V), r.choose(*FLOATS), 3.0)
    tokens, mask = r.tokens(rows, V), r.maybe_mask(rows)
    with_entropy, needed, uses = r.chance(0.5), r.chance(0.7), r.choose("both", "first", "second")
    temperature, inplace = r.choose(1.0, 0.7, 2), r.chance(0.3) and 0 not in logits.stride()

    def call(backend: str) -> list[Tensor]:
        x = logits
        if inplace:  # the gradient overwrites the logits, so each backend gets its own, with the same strides
            x = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
        x = leaf(x, needed)
        out = ppo.token_logprobs(
            x, tokens, mask, temperature=temperature, with_entropy=with_entropy, inplace_backward=inplace,
            backend=backend,
        )  # fmt: skip
        outputs = list(out) if isinstance(out, tuple) else [out]
        chosen = {"both": outputs, "first": outputs[:1], "second": outputs[-1:]}[uses]
        return with_gradients(chosen, [x])

    return call


def loss_options(r: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {"aggregation": r.choose(*AGGREGATIONS)}
    if options["aggregation"] != "token-sum" and r.chance(0.4):
        number = r.choose(3.0, 7, 11.5)
        dtype = r.choose(torch.float32, torch.float64, torch.int64, torch.int32)
        options["denominator"] = r.choose(number, torch.tensor(number).to(dtype))
    if options["aggregation"] == "seq-mean-token-sum-norm":
        options["norm_length"] = r.choose(2.0, 9)
    if len(shape) == 1:
        options["cu_seqlens"] = r.boundaries(shape[0])
    return options


def policy_options(r: Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"clip_low": r.choose(0.2, 0.1, 1), "clip_high": r.choose(0.2, 0.3)}
    options["dual_clip"] = r.choose(None, 1.5, 3)
    if r.chance(0.5):
        options |= {"ref_logprobs": r.normal(shape, dtype, 0.3), "kl_coef": r.choose(0.1, 0.0, 1)}
        options["kl_estimator"] = r.choose(*KL_ESTIMATORS)
    if r.chance(0.3):
        options["weights"] = r.normal(shape, dtype).abs()
    return options


def loss_shape(r: Inputs) -> tuple[int, ...]:
    return r.choose((1, 1), (3, 5), (2, 300), (2, 2, 40), (1, 1030), (4, 512), (7,), (600,), (1300,), (2, 1024))


def losses(r: Inputs) -> Call:
    """policy_loss, value_loss and ppo_loss."""
    kind, shape = r.choose("policy", "value", "ppo"), loss_shape(r)
    dtype = r.choose(*FLOATS)
    mixed = r.choose(dtype, dtype, *FLOATS)  # of the values
    data = r.choose(dtype, torch.float32)  # of what gets no gradient
    policy = {"logprobs": r.normal(shape, dtype, 0.3), "old_logprobs": r.normal(shape, data, 0.3)}
    policy["advantages"] = r.normal(shape, data)
    value = {"values": r.normal(shape, mixed), "old_values": r.normal(shape, r.choose(mixed, data))}
    value["returns"] = r.normal(shape, data)
    mask, options = r.maybe_mask(shape), loss_options(r, shape)
    needed = {name: r.chance(0.8) for name in ("logprobs", "values", "entropy")}
    entropy = r.normal(shape, r.choose(dtype, torch.float32)).abs() if kind != "value" and r.chance(0.5) else None
    clip = r.choose(0.2, None, 1)
    if kind != "value":
        options |= policy_options(r, shape, data) | {
            "entropy_coef": r.choose(0.01, 0.0, 1) if entropy is not None else 0.0
        }
    if kind == "ppo":
        options |= {"value_coef": r.choose(0.5, 1), "value_clip": clip, "value_mask": r.maybe_mask(shape)}
    elif kind == "value":
        options["clip"] = clip

    def call(backend: str) -> list[Tensor]:
        x = {name: leaf(t, needed.get(name, False)) for name, t in (policy | value).items()}
        h = leaf(entropy, needed["entropy"])
        given = options if kind == "value" else options | {"entropy": h}
        names = {
            "policy": ("logprobs", "old_logprobs", "advantages"),
            "value": ("values", "old_values", "returns"),
            "ppo": ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns"),
        }[kind]
        function = {"policy": ppo.policy_loss, "value": ppo.value_loss, "ppo": ppo.ppo_loss}[kind]
        out = function(*(x[name] for name in names), mask, **given, backend=backend)
        leaves = [x[name] for name in ("logprobs", "values") if name in names] + ([] if h is None else [h])
        return with_gradients([out.loss, *out.stats.values()], leaves)

    return call


def gae(r: Inputs) -> Call:
    layout = r.choose("rows", "rows", "packed", "time-major")
    if layout == "packed":
        shape: tuple[int, ...] = (r.choose(1, 40, 700, 2100),)
    elif layout == "time-major":
        shape = r.choose((1, 1), (20, 5), (70, 130), (3, 256), (17, 4), (130, 2, 4), (130, 16), (300, 4))
    else:
        shape = r.choose((1, 1), (5, 20), (3, 32), (3, 33), (2, 600), (5, 2100), (2, 2, 64), (1, 1024))
    dtype = r.choose(*FLOATS)
    other = r.choose(dtype, dtype, *FLOATS)
    options: dict[str, Any] = {"gamma": r.choose(1.0, 0.99, 1), "lam": r.choose(0.95, 0, 1)}
    if layout == "packed":
        options["cu_seqlens"] = r.boundaries(shape[0])
        rows: tuple[int, ...] = (len(options["cu_seqlens"]) - 1,)
    else:
        rows = shape[1:] if layout == "time-major" else shape[:-1]
    options["time_major"] = layout == "time-major"
    rewards, values = r.normal(shape, dtype), r.normal(shape, other)
    if r.chance(0.5):
        options["mask"] = r.mask(shape)
    if r.chance(0.4):
        options["terminated"] = r.mask(shape, 0.1)
    if r.chance(0.4):
        options |= {"truncated": r.mask(shape, 0.1), "final_values": r.normal(shape, r.choose(dtype, torch.float32))}
    if r.chance(0.4):
        options["bootstrap"] = r.normal(rows, r.choose(dtype, torch.float32)) if rows else torch.tensor(0.3)
    for name in ("gamma", "lam"):
        if r.chance(0.2) and rows:
            options[name] = r.normal(rows).abs().clamp(max=1.0)

    return lambda backend: list(ppo.gae(rewards, values, **options, backend=backend))


def advantages(r: Inputs) -> Call:
    """shape_rewards and rlhf_advantages."""
    B, T = r.choose((1, 1), (5, 20), (3, 32), (3, 64), (2, 600), (1, 2101), (1, 2500), (2, 3000), (3, 1024))
    dtype = r.choose(*FLOATS)
    other = r.choose(dtype, dtype, *FLOATS)
    logprobs, refs, values = (r.normal((B, T), d) for d in (dtype, r.choose(dtype, other), other))
    scores = r.normal((B, T) if r.chance(0.4) else (B,), r.choose(dtype, torch.float32))
    mask, whole = r.mask((B, T)), r.chance(0.6)
    per_token = scores.ndim == 2
    options: dict[str, Any] = {"kl_coef": r.choose(0.05, 0, 1), "kl_estimator": r.choose(*KL_ESTIMATORS)}
    options["score_clip"] = r.choose(None, 0.5, 1)
    options["reward_at"] = "last" if per_token else r.choose("last", "after_last")
    if not whole:
        return lambda backend: list(ppo.shape_rewards(scores, logprobs, refs, mask, **options, backend=backend))
    options |= {"gamma": r.choose(1.0, 0.9), "lam": r.choose(0.95, 1)} | {"whiten": r.chance(0.7)}
    options |= {"shift_mean": r.chance(0.7), "unbiased": r.chance(0.7), "min_std": r.choose(0.0, 0.0, 1.5)}
    for name in ("gamma", "lam"):
        if r.chance(0.2):
            options[name] = r.normal((B,)).abs().clamp(max=1.0)
    if r.chance(0.5):
        options["critic_lam"] = r.choose(1, 0.9, r.normal((B,)).abs().clamp(max=1.0))
    if r.chance(0.3):
        options["bootstrap"] = r.normal((B,), r.choose(dtype, torch.float32))

    def call(backend: str) -> list[Tensor]:
        out = ppo.rlhf_advantages(scores, logprobs, refs, values, mask, **options, backend=backend)
        return [*out[:4], *out.stats.values()]

    return call


@contextmanager
def single_process_group() -> Iterator[dist.ProcessGroup | None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def masked_whiten(r: Inputs) -> Call:
    shape = r.choose((1,), (7,), (5, 20), (3, 1024), (2, 1500), (3, 4, 5), (2, 256))
    x, mask = r.normal(shape, r.choose(*FLOATS)), r.maybe_mask(shape)
    options = {"shift_mean": r.chance(0.7), "unbiased": r.chance(0.7), "min_std": r.choose(0.0, 0.0, 1.5)}
    grouped = r.chance(0.1)

    def call(backend: str) -> list[Tensor]:
        with single_process_group() if grouped else nullcontext() as group:
            return [ppo.masked_whiten(x, mask, **options, group=group, backend=backend)]

    return call


def linear_inputs(r: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options of the head."""
    shape, V = r.choose((1,), (5,), (2, 3)), r.choose(3, 64, 1000, 2048, 3000, 8200)
    D, dtype = r.choose(8, 16), r.choose(*FLOATS)
    x: dict[str, Any] = {"hidden": r.normal((*shape, D), dtype), "weight": r.normal((V, D), dtype, D**-0.5)}
    x["bias"] = r.normal((V,), r.choose(dtype, torch.float32)) if r.chance(0.3) else None
    options: dict[str, Any] = {"temperature": r.choose(1.0, 0.7), "softcap": r.choose(None, None, 5.0)}
    options["logit_scale"] = r.choose(1.0, 0.5, 2)
    options["logits_dtype"] = r.choose(None, None, dtype)
    options["chunk_bytes"] = r.choose(None, None, 1 << 16)
    x |= {"tokens": r.tokens(shape, V), "mask": r.maybe_mask(shape)}
    return x, options


def linear_logprobs(r: Inputs) -> Call:
    x, options = linear_inputs(r)
    needed, with_entropy = r.choose((), ("hidden",), ("hidden", "weight", "bias")), r.chance(0.5)

    def call(backend: str) -> list[Tensor]:
        t = {name: leaf(x[name], name in needed) for name in ("hidden", "weight", "bias")}
        out = ppo.linear_logprobs(
            t["hidden"], t["weight"], x["tokens"], x["mask"], bias=t["bias"], with_entropy=with_entropy, **options,
            backend=backend,
        )  # fmt: skip
        return with_gradients(list(out) if isinstance(out, tuple) else [out], [t[n] for n in t if t[n] is not None])

    return call


def linear_ppo_loss(r: Inputs) -> Call:
    x, options = linear_inputs(r)
    shape = tuple(x["tokens"].shape)
    needed = r.choose((), ("hidden",), ("hidden", "weight", "bias"))
    old = r.choose(None, r.normal(shape, scale=0.1) - 5)
    advantages_ = r.normal(shape)
    options |= loss_options(r, shape) | policy_options(r, shape, torch.float32)
    options["entropy_coef"] = r.choose(0.0, 0.01)

    def call(backend: str) -> list[Tensor]:
        t = {name: leaf(x[name], name in needed) for name in ("hidden", "weight", "bias")}
        out = ppo.linear_ppo_loss(
            t["hidden"], t["weight"], x["tokens"], old, advantages_, x["mask"], bias=t["bias"], **options,
            backend=backend,
        )  # fmt: skip
        outputs = [out.loss, *out.stats.values(), out.logprobs, out.entropy]
        return with_gradients(outputs, [t[n] for n in t if t[n] is not None])

    return call


FAMILIES = (token_logprobs, token_logprobs, token_logprobs, losses, losses, gae, gae, advantages, masked_whiten)
FAMILIES += (linear_logprobs, linear_ppo_loss)


@functools.cache
def make_call(number: int) -> tuple[str, Call]:
    """The name of the operation and the call of this number."""
    family = FAMILIES[number % len(FAMILIES)]
    return family.__name__, family(Inputs(number))
