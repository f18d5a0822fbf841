"""The peak memory of a PPO step on a GPU, calculated before the first step.

The models run on PyTorch's fake tensors, which have shapes and no data, and every storage that they would allocate is
counted. This follows each family of models, LoRA and gradient checkpointing without a formula for each. Two models of
few layers are run, and the rest is extrapolated, since layers are alike.

Attention counts as FlashAttention does (queries, keys, values, the output and one number for each query and head), and
the head as the Triton backend cuts it into chunks. Not counted: the CUDA context (about 0.5 GiB), workspaces of
libraries, and gaps between allocations.
"""

import copy
import dataclasses
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ppo_fast.common.errors import UserError
from ppo_fast.common.text import first_line
from ppo_fast.kernels.linear.chunks import DEVICE_CHUNK_ROWS, Plan, compute_plan
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import cache_options
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.frozen import frozen_dtype_of, store_frozen
from ppo_fast.llm.models.head import LanguageModel, decoder_of, head_dtype, head_of, input_embedding, unwrap_peft
from ppo_fast.llm.models.lora import with_lora
from ppo_fast.llm.models.modes import gradient_checkpointing
from ppo_fast.llm.models.policy import with_chunk_bytes
from ppo_fast.llm.models.reference import is_adapted

if TYPE_CHECKING:
    from peft import PeftModel

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

NAME = "ppo_fast_memory"
HALF = (torch.float16, torch.bfloat16)
LAYERS = (2, 4, 8, 16)  # of the models that are run: even numbers, since layers with and without a window may alternate
MOMENTS = 2  # that AdamW keeps of a weight, in its dtype
SAMPLED_LOGITS = 5  # fp32 copies of a step's logits [B, V] while sampling: the model's, generate's, the recorder's
FILTERED_LOGITS = 10  # with top-k, top-p or min-p, which sort them


class CannotEstimate(UserError):
    """The peak memory of a model cannot be calculated; the message tells why."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by phase of a step and, within a phase, by part, at the phase's peak."""

    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        """Of the whole step."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def __str__(self) -> str:
        """A table in GiB."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name in parts))
        sums = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        rows = [["GiB", *self.phases], ["---", *("---:" for _ in self.phases)]]
        for name in names:
            rows.append([name, *(f"{parts.get(name, 0) / 2**30:.2f}" for parts in self.phases.values())])
        rows.append(["sum", *(f"{x / 2**30:.2f}" for x in sums.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside this block and still alive, by category, and their peak."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = {x.untyped_storage()._cdata for x in weights}
        self.name = "activations"  # the present category
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._alive: dict[int, tuple[str, int]] = {}  # category and size of each storage

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        category = self.name
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            category = "weights in bfloat16" if _dtype_of(out) in HALF else "weights in float32"
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), category)
        return out

    def _is_weight(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.weights

    def _count(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        if key in self._alive or key in self.weights:
            return
        size = -(-storage.nbytes() // 512) * 512  # PyTorch's allocator rounds up to this
        self._alive[key] = category, size
        self.current[category] += size
        weakref.finalize(storage, self._release, key)
        if self.current.total() > self.peak.total():
            self.peak = self.current.copy()

    def _release(self, key: int) -> None:
        category, size = self._alive.pop(key)
        self.current[category] -= size

    def move(self, x: Tensor, category: str) -> None:
        """From here on the tensor counts in this category."""
        key = x.untyped_storage()._cdata
        before, size = self._alive[key]
        self._alive[key] = category, size
        self.current[before] -= size
        self.current[category] += size

    def reset_peak(self) -> dict[str, int]:
        """The peak since the last call, by category."""
        peak, self.peak = self.peak, self.current.copy()
        return dict(peak)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What is made inside this block has this name."""
        before, self.name = self.name, name
        yield
        self.name = before


def _dtype_of(x: object) -> torch.dtype | None:
    return x.dtype if isinstance(x, Tensor) else None


# Operations of layers that autocast computes in fp32 on a GPU; a CPU's autocast leaves them as they are
_FP32_ON_GPU = {
    "cumsum",
    "exp",
    "layer_norm",
    "log",
    "log_softmax",
    "norm",
    "pow",
    "rsqrt",
    "softmax",
    "softplus",
    "sum",
}


class _GpuAutocast(TorchFunctionMode):
    """Autocast on the CPU with the fp32 operations of a GPU's."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__name__", "").strip("_") in _FP32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype in HALF else x for x in args)
        return func(*args, **(kwargs or {}))


class _FlashContext(Protocol):
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Flash(torch.autograd.Function):
    """The memory of FlashAttention: what it saves, and what its backward allocates."""

    @staticmethod
    def forward(ctx: _FlashContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: _FlashContext, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        _accumulator = torch.empty_like(q, dtype=torch.float32)  # of dq, over blocks of keys
        return tuple(torch.empty_like(x) for x in (q, k, v))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """transformers' attention signature."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    sampling = query.shape[0] > 1 or query.shape[2] != key.shape[2]
    if sampling or query.dtype == torch.float32:  # SDPA with a mask or in fp32 repeats the heads of grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return _Flash.apply(query, key, value), None


class _LinearHeadContext(Protocol):
    gradients: tuple[Tensor, Tensor | None]


class _LinearHead(torch.autograd.Function):
    """The memory of `linear_ppo_loss`: a chunk of logits at a time, and gradients that are made in the forward."""

    @staticmethod
    def forward(ctx: _LinearHeadContext, hidden: Tensor, weight: Tensor, plan: Plan, trains_weight: bool) -> Tensor:
        V, D = weight.shape
        d_hidden = hidden.new_empty(hidden.shape)
        d_weight = weight.new_empty(V, D) if trains_weight else None
        logits = hidden.new_empty(min(plan.rows, len(hidden)), V, dtype=plan.logits)
        _dlogits = torch.empty_like(logits, dtype=plan.operand) if plan.separate else None
        _accumulator = weight.new_empty(V, D, dtype=plan.arithmetic) if weight.dtype != plan.arithmetic else None
        _tile = weight.new_empty(plan.tile, D, dtype=plan.operand) if weight.dtype != plan.operand else None
        ctx.gradients = d_hidden, d_weight
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: _LinearHeadContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients, None, None


@contextmanager
def _counted_attention(*models: nn.Module) -> Iterator[None]:
    AttentionInterface.register(NAME, _attend)
    for model in models:
        for module in model.modules():
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                config._attn_implementation_internal = NAME
    yield


@dataclass
class _Models:
    """Fake models of few layers."""

    actor: LanguageModel
    critic: Critic
    reference: LanguageModel | None

    def modules(self) -> list[nn.Module]:
        return [x for x in (self.actor, self.critic, self.reference) if x is not None]


def _shallow(model_config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with fewer layers."""
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    return config


def _build(model_config: PreTrainedConfig, config: PPOConfig, dtype: torch.dtype) -> _Models:
    """The models of a run on the meta device."""

    with torch.device("meta"):
        actor = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        critic = Critic.shared(actor) if config.critic == "shared" else Critic.from_actor(actor)
        if critic.backbone is not None:
            critic.backbone = with_lora(critic.backbone, config, language_model=False)
        separate = config.kl_coef > 0 and not config.lora_rank
        reference = copy.deepcopy(actor).requires_grad_(False) if separate else None
        models = _Models(with_lora(actor, config, language_model=True), critic, reference)
        frozen = [x for x in (models.actor, critic.backbone) if config.lora_rank and x is not None]
        for model in [*frozen, *([] if reference is None else [reference])]:
            store_frozen(model, frozen_dtype_of(config))
        return models


def _make_fake(models: _Models) -> None:
    """Replace meta tensors by the current mode's fake ones, which autocast knows. Tied weights stay tied."""
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    for module in (m for model in models.modules() for m in model.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in parameters:
                    parameters[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                module._parameters[name] = parameters[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                if id(b) not in buffers:
                    buffers[id(b)] = torch.empty(b.shape, dtype=b.dtype)
                module._buffers[name] = buffers[id(b)]


def _bytes(tensors: list[Tensor]) -> int:
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _static(models: _Models) -> dict[str, int]:
    """Weights and what AdamW keeps, from the first update on."""
    tensors = [x for module in models.modules() for x in (*module.parameters(), *module.buffers())]
    trained = [p for module in (models.actor, models.critic) for p in module.parameters() if p.requires_grad]
    return {"weights": _bytes(tensors), "optimizer": MOMENTS * sum(p.nbytes for p in trained)}


@dataclass(frozen=True)
class _Sizes:
    """Of a step."""

    prompt: int  # longest prompt, tokens
    completion: int  # longest completion, tokens
    batch: int  # completions that are generated at once
    tokens: int  # of the largest pack
    completions: int  # completion tokens of that pack
    several_packs: bool  # in a minibatch

    @classmethod
    def of(cls, config: PPOConfig, prompt: int) -> "_Sizes":
        whole = prompt + config.max_new_tokens
        rollout = config.prompts_per_step * config.samples_per_prompt
        in_minibatch = -(-rollout // config.minibatches) * whole
        tokens = max(whole, min(config.micro_batch_tokens, in_minibatch) // whole * whole)
        completions = tokens // whole * config.max_new_tokens
        batch = min(rollout, config.sample_batch_size)
        return cls(prompt, config.max_new_tokens, batch, tokens, completions, in_minibatch > config.micro_batch_tokens)


def _autocast(config: PPOConfig) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.dtype != "float32")  # float16 has the same size


def _hidden(model: nn.Module, tokens: int) -> Tensor:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state[0]


def _head_weight(actor: LanguageModel) -> Tensor:
    head = head_of(actor)
    weight = None if head is None else head.weight
    assert isinstance(weight, Tensor)
    return weight


def _learn(models: _Models, config: PPOConfig, sizes: _Sizes, counted: Allocations) -> dict[str, dict[str, int]]:
    """A pack that is not a minibatch's first, if there are such packs: gradients are there already."""
    weight = _head_weight(models.actor)
    both = nn.ModuleList([models.actor, models.critic])
    hooks = []
    for p in (p for p in both.parameters() if p.requires_grad):
        hooks.append(p.register_post_accumulate_grad_hook(lambda p: counted.move(_gradient(p), "gradients")))
        if sizes.several_packs:
            with counted.category("gradients"):
                p.grad = torch.empty_like(p)
    found: dict[str, dict[str, int]] = {}
    backbones = [x for x in (models.actor, models.critic.backbone) if x is not None]
    embeddings = [unwrap_peft(backbone).get_input_embeddings() for backbone in backbones]
    hooks += [x.register_forward_hook(lambda *args: _at_gradient(args[-1], found, counted)) for x in embeddings]
    with gradient_checkpointing(both, enabled=config.gradient_checkpointing):
        with _autocast(config):
            hidden = _hidden(decoder_of(models.actor), sizes.tokens)
            chosen = hidden[: sizes.completions].clone()
            with counted.category("logits"):
                loss = _LinearHead.apply(chosen, weight, _plan(chosen, weight, config), weight.requires_grad)
            found["loss"] = counted.reset_peak()
            states = hidden if models.critic.backbone is None else _hidden(models.critic.backbone, sizes.tokens)
            loss = loss + models.critic(states[: sizes.completions].clone()).sum()
            del hidden, states, chosen
        loss.backward()
    del loss
    for hook in hooks:
        hook.remove()
    found["backward/end"] = counted.reset_peak()
    found["update"] = counted.reset_peak()
    return found


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None  # this is called in a hook after its accumulation
    return p.grad


def _at_gradient(embedded: Tensor, found: dict[str, dict[str, int]], counted: Allocations) -> None:
    """End a part of the backward when the gradient reaches the embeddings: the gradient of their weight follows, which
    does not grow with the number of layers."""
    if embedded.requires_grad:
        embedded.register_hook(lambda _: found.update({f"backward/{len(found)}": counted.reset_peak()}))


def _plan(hidden: Tensor, weight: Tensor, config: PPOConfig) -> Plan:
    """That of a GPU, whose products of half precision accumulate in fp32."""
    return compute_plan(
        (weight.shape[0], weight.shape[1], len(hidden), False),
        (hidden.dtype, weight.dtype, None, head_dtype(config)),
        "widening",
        (DEVICE_CHUNK_ROWS, 0),
        True,
        config.backend == "torch",
        config.chunk_bytes,
        (True, True, True),
        0,
    )


def _score(models: _Models, config: PPOConfig, sizes: _Sizes, counted: Allocations) -> dict[str, dict[str, int]]:
    weight = _head_weight(models.actor)
    backbones = [decoder_of(models.actor)]
    backbones += [models.critic.backbone] if models.critic.backbone is not None else []
    backbones += [decoder_of(models.reference)] if models.reference is not None else []
    with torch.no_grad(), _autocast(config):
        for backbone in backbones:
            hidden = _hidden(backbone, sizes.tokens)[: sizes.completions].clone()
            with counted.category("logits"):
                plan = _plan(hidden, weight, config)
                _logits = hidden.new_empty(plan.rows, len(weight), dtype=plan.logits)
            del _logits
    return {"score": counted.reset_peak()}


SAMPLING = ("prompts", "last token")  # the phases of sampling


def _in_category(name: str, function: Callable[Arguments, Result], counted: Allocations) -> Callable[Arguments, Result]:
    """The function, whose allocations count in this category."""

    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with counted.category(name):
            return function(*args, **options)

    return call


def _sample(models: _Models, config: PPOConfig, sizes: _Sizes, counted: Allocations) -> dict[str, dict[str, int]]:
    """All tokens of the prompts at once, and the last token of the completions, for which the cache is largest."""
    V = input_embedding(models.actor).shape[0]
    copies = FILTERED_LOGITS if config.top_k or config.top_p < 1 or config.min_p else SAMPLED_LOGITS
    ids = torch.zeros(sizes.batch, sizes.prompt, dtype=torch.int64)
    plain = DynamicCache(config=models.actor.config)
    cache: DynamicCache = cache_options(models.actor, config.dtype).get("past_key_values", plain)
    update = _in_category("key-value cache", cache.update, counted)
    cache.update = update  # type: ignore[method-assign]  # of this object only
    found = {}
    with torch.no_grad(), _autocast(config):
        models.actor(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found["prompts"] = counted.reset_peak()
        with counted.category("key-value cache"):
            for layer in cache.layers:
                _lengthen(layer, sizes.completion - 2)
        with counted.category("logits"):
            _logits = torch.empty(copies, sizes.batch, V)
        counted.reset_peak()
        models.actor(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        found["last token"] = counted.reset_peak()
    return found


def _lengthen(layer: object, tokens: int) -> None:
    """Give a layer's cache room for more tokens, up to its window."""
    if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
        raise TypeError(f"a {type(layer).__name__} has no keys and values")
    length = layer.keys.shape[2] + tokens
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        length = min(length, window - 1)
    layer.keys, layer.values = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (layer.keys, layer.values))


def _phases(
    model_config: PreTrainedConfig, config: PPOConfig, sizes: _Sizes, dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    models = _build(model_config, config, dtype)
    with FakeTensorMode(), _GpuAutocast():
        _make_fake(models)
        static = _static(models)
        for module in models.modules():
            module.eval()
        weights = [x for module in models.modules() for x in (*module.parameters(), *module.buffers())]
        found: dict[str, dict[str, int]] = {}
        with _counted_attention(*models.modules()):
            for phase in (_sample, _score, _learn):
                with Allocations(weights) as counted:
                    found |= phase(models, config, sizes, counted)
    return {name: {**static, **parts} for name, parts in found.items()}


@contextmanager
def _without_logs() -> Iterator[None]:
    """PyTorch logs a traceback of each operation that fake tensors cannot run; the error tells enough."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _of_layers(
    layers: int, model_config: PreTrainedConfig, config: PPOConfig, sizes: _Sizes, dtype: torch.dtype
) -> dict[str, dict[str, int]]:
    """The phases of the same model with so many layers."""
    try:
        with _without_logs():
            return _phases(_shallow(model_config, layers), config, sizes, dtype)
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises on tensors without data
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CannotEstimate(f"the peak memory of {_name(model_config)} cannot be calculated ({reason})") from error


def _name(model_config: PreTrainedConfig) -> str:
    return f"a model of type {model_config.model_type!r}"


def estimate(
    model_config: PreTrainedConfig,
    config: PPOConfig,
    prompt_tokens: int,
    *,
    processes: int = 1,
    gathered: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Calculate the peak memory of each phase of a step, in bytes. dtype = auto counts as bfloat16, as on most GPUs.

    Args:
        model_config: of the actor, with which the critic and the reference start, too.
        config: the run's options; `chunk_bytes` as it is used on the GPU (`policy.with_chunk_bytes`).
        prompt_tokens: the longest prompt.
        processes: FSDP2 divides weights, gradients and the optimizer's state among so many GPUs.
        gathered: bytes of weights that a process holds besides while it samples.
        dtype: of the weights, as they are loaded.

    Raises:
        CannotEstimate: the model is not a causal language model of transformers, or does not run without data.

    >>> from transformers import LlamaConfig
    >>> found = estimate(LlamaConfig(num_hidden_layers=16, hidden_size=256), PPOConfig(), prompt_tokens=100)
    >>> sorted(found.phases)
    ['backward', 'last token', 'loss', 'prompts', 'score', 'update']
    """
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="bfloat16")
    if processes > 1:  # FSDP2 keeps the dtype of frozen weights
        config = dataclasses.replace(config, frozen_dtype="float32")
    if prompt_tokens < 1:
        raise UserError(f"prompt_tokens must be at least 1, got {prompt_tokens}")
    depth = getattr(model_config, "num_hidden_layers", None)
    if depth is None:
        raise CannotEstimate(f"the peak memory of {_name(model_config)} cannot be calculated: it has no layers")
    sizes = _Sizes.of(config, prompt_tokens)
    upper, more = LAYERS[0], _of_layers(LAYERS[0], model_config, config, sizes, dtype)
    for layers in LAYERS[1:]:
        (lower, few), upper = (upper, more), layers
        more = _of_layers(layers, model_config, config, sizes, dtype)
        if depth <= upper or all(few[name].get(part, 0) <= more[name].get(part, 0) for name, part in _parts(few)):
            break  # else a part has become smaller: the peaks are at different moments of the phase
    whole: dict[str, dict[str, int]] = {}
    for name in more:
        parts = {}
        for part in dict.fromkeys([*few[name], *more[name]]):
            a, b = few[name].get(part, 0), more[name].get(part, 0)
            size = max(0, a + (b - a) * (depth - lower) // (upper - lower))
            parts[part] = size // processes if part in ("weights", "gradients", "optimizer") else size
        phase = name.partition("/")[0]
        if sum(parts.values()) >= sum(whole.get(phase, {}).values()):
            whole[phase] = parts
    for name in SAMPLING if gathered else ():
        whole[name]["gathered weights"] = gathered
    return Estimate(whole)


def _parts(phases: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    return [(name, part) for name, parts in phases.items() for part in parts]


def table(model_config: PreTrainedConfig, config: PPOConfig, prompt_tokens: int, memory: int | None = None) -> str:
    """The estimate in GiB as Markdown, and whether it fits `memory` bytes of a GPU."""
    V = getattr(model_config.get_text_config(), "vocab_size", None)
    if V is None:
        raise CannotEstimate(f"the peak memory of {_name(model_config)} cannot be calculated: it has no vocabulary")
    found = estimate(model_config, with_chunk_bytes(config, V, memory), prompt_tokens)
    text = f"{found}\n\npeak: {found.peak / 2**30:.2f} GiB, in {found.largest_phase!r}"
    if memory is None:
        return text
    verdict = "fits" if found.peak <= memory else "does not fit"
    return f"{text}; it {verdict} a GPU with {memory / 2**30:.1f} GiB"


def at_most(model_config: PreTrainedConfig, config: PPOConfig, prompt_tokens: int, parameters: int) -> int:
    """Bytes that a step does not exceed, without the seconds that `estimate` takes: up to four times as many.

    Args:
        model_config: of the actor.
        config: the run's options.
        prompt_tokens: the longest prompt.
        parameters: of the actor.
    """
    sizes, text = _Sizes.of(config, prompt_tokens), model_config.get_text_config()
    width, layers, V = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if width is None or layers is None or V is None:
        return sys.maxsize
    inner = getattr(text, "intermediate_size", None) or 4 * width
    models = 40 * parameters  # actor and critic with gradients, moments and copies in bfloat16, and the reference
    activations = 2 * layers * sizes.tokens * (80 * width + 20 * inner)
    head = 8 * DEVICE_CHUNK_ROWS * V + 4 * V * width + 8 * sizes.tokens * width
    cache = 8 * layers * sizes.batch * (sizes.prompt + sizes.completion) * width
    sampling = 4 * FILTERED_LOGITS * sizes.batch * V + 16 * sizes.batch * sizes.prompt * (2 * width + inner)
    return models + activations + head + cache + sampling


def with_adapters_of(actor: "PeftModel", config: PPOConfig) -> PPOConfig:
    """The options that give a model adapters as large as those of this PeftModel."""
    adapters = actor.peft_config[actor.active_adapter]
    targets = getattr(adapters, "target_modules", None)
    return dataclasses.replace(
        config,
        frozen_dtype="float32" if config.frozen_dtype == "auto" else config.frozen_dtype,  # its base is unchanged
        lora_rank=getattr(adapters, "r", 16),
        lora_targets=",".join(sorted(targets)) if isinstance(targets, set | list) else config.lora_targets,
    )


def why_unknown(actor: nn.Module) -> str | None:
    """Why the memory of an actor does not follow from its configuration; None if it does."""
    if getattr(unwrap_peft(actor).config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if not is_adapted(actor) and not all(p.requires_grad for p in actor.parameters()):
        return "some of its weights are frozen"
    return None


def check_fits(
    model_config: PreTrainedConfig,
    config: PPOConfig,
    prompt_tokens: int,
    memory: int,
    *,
    parameters: int,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise UserError if the calculated peak is more than the GPU's memory, in bytes, with options that reduce it."""
    if processes == 1 and at_most(model_config, config, prompt_tokens, parameters) <= memory:
        return  # the estimate would take seconds

    def estimated(config: PPOConfig) -> Estimate:
        size = 4 if config.dtype == "float32" else 2
        gathered = parameters * size if config.gather_for_sampling and processes > 1 else 0
        return estimate(model_config, config, prompt_tokens, processes=processes, gathered=gathered, dtype=dtype)

    found = estimated(config)
    if found.peak <= memory:
        return
    tried = []
    for text, changed in _smaller(config, processes):
        needed = estimated(changed).peak
        tried.append(f"{text} ({needed / 2**30:.1f} GiB)")
        if needed <= memory:
            break
    raise UserError(
        f"a step needs {found.peak / 2**30:.1f} GiB by calculation (most in {found.largest_phase!r}), and the GPU has"
        f" {memory / 2**30:.1f} GiB; options that reduce it, each added to those before: {', '.join(tried)}; with"
        " --no-check-memory it is tried anyway"
    )


def _smaller(config: PPOConfig, processes: int) -> list[tuple[str, PPOConfig]]:
    """Options that reduce memory, each added to those before it."""
    found = []
    if config.gather_for_sampling and processes > 1:
        config = dataclasses.replace(config, gather_for_sampling=False)
        found.append(("--no-gather-for-sampling", config))
    if config.dtype == "float32":
        config = dataclasses.replace(config, dtype="bfloat16")
        found.append(("--dtype bfloat16", config))
    if not config.gradient_checkpointing:
        config = dataclasses.replace(config, gradient_checkpointing=True)
        found.append(("--gradient-checkpointing", config))
    if config.micro_batch_tokens > 1024:
        config = dataclasses.replace(config, micro_batch_tokens=1024)
        found.append(("--micro-batch-tokens 1024", config))
    if config.critic != "shared":
        config = dataclasses.replace(config, critic="shared")
        found.append(("--critic shared", config))
    if not config.lora_rank:
        config = dataclasses.replace(config, lora_rank=16)
        found.append(("--lora-rank 16", config))
    return found
