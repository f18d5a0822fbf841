"""The launches of linear_logprobs and linear_ppo_loss: the epilogue of a chunk of logits, and the final scaling."""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ppo_fast.kernels.common.launch import REGISTERS, Variant, device_guard, launch_options
from ppo_fast.kernels.common.online_softmax import warp_size
from ppo_fast.kernels.linear.chunks import LINE, Gradients, Head
from ppo_fast.kernels.linear.kernel import linear_gradient_kernel, linear_policy_kernel, linear_score_kernel
from ppo_fast.kernels.linear.scale_kernel import linear_scale_kernel
from ppo_fast.kernels.linear.steps import IndexedEpilogue, ShapeAndDtype
from ppo_fast.kernels.loss import launch as loss_launch
from ppo_fast.kernels.loss.options import LossOptions, LossTensors, named_stats, wanted_stats
from ppo_fast.kernels.reference import KL_ESTIMATORS


class _Tile(NamedTuple):
    BLOCK: int
    LANES: int  # partial sums kept per row: those of one thread, whether 32 or 64 of them execute together
    threads: int


_POLICY_REGISTERS = 128  # two blocks of the larger tile on a multiprocessor
# One for all V, so that a row's bits depend on nothing but the row. Smaller where tanh needs registers.
_TILES = {False: _Tile(8192, 2048, 256), True: _Tile(2048, 1024, 128)}


def _kernel(kind: str) -> triton.JITFunction:
    return {"score": linear_score_kernel, "policy": linear_policy_kernel, "gradient": linear_gradient_kernel}[kind]


@functools.cache
def _config(
    kind: str,  # "score", "policy" or "gradient"
    transformed: bool,
    logits: torch.dtype,
    dlogits: torch.dtype,
    with_entropy: bool,
    threads_per_warp: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """The constexprs of a launch and its options. Where tanh costs more, the entropy is always computed."""
    kernel = _kernel(kind)
    values: dict[str, int] = _TILES[transformed]._asdict() | {"TRANSFORMED": transformed}
    values |= {"PAD": LINE // logits.itemsize, "D_PAD": LINE // dlogits.itemsize}
    values["WITH_ENTROPY"] = with_entropy or transformed
    registers = {"score": None, "policy": _POLICY_REGISTERS, "gradient": REGISTERS}[kind]
    options = launch_options(_TILES[transformed].threads // threads_per_warp, registers)
    return {name: values[name] for name in kernel.arg_names if name in values}, options


_SCALE_BLOCK = 2048  # elements of a program of scale_gradients: 64 bytes of fp32 for a thread
_SCALE_OPTIONS = launch_options(4)
_SCALE_UNIT = 8  # elements; rows whose length is a multiple of it start at multiples of 16 bytes
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# (logits, dlogits): operands of 2 bytes, whose products may be 4 bytes; or all 4 bytes.
_DTYPES = [(logits, low) for low in (torch.float16, torch.bfloat16) for logits in (torch.float32, low)]
_DTYPES += [(torch.float32, torch.float32)]


@functools.cache
def _keywords(
    kind: str,
    transformed: bool,
    logits: torch.dtype,
    dlogits: torch.dtype,
    with_entropy: bool,
    threads_per_warp: int,
) -> dict[str, int]:
    """Both in one dict. Do not change the result: it is shared."""
    constexprs, options = _config(kind, transformed, logits, dlogits, with_entropy, threads_per_warp)
    return constexprs | options


def variants(threads_per_warp: int = 32) -> list[Variant]:
    """Return every variant that the launches below can start on a GPU with such warps."""
    found = []
    for transformed in (False, True):
        for logits, dlogits in _DTYPES:
            name = f"aligned {str(logits)[6:]} {str(dlogits)[6:]}{' transformed' if transformed else ''}"
            for kind in ("policy", "gradient"):
                config = _config(kind, transformed, logits, dlogits, True, threads_per_warp)
                types = _types(_kernel(kind), logits, dlogits)
                found.append(Variant(f"linear {kind} {name}", _kernel(kind), types, *config))
        kernel = linear_score_kernel
        for logits in _POINTERS:
            for with_entropy in (True,) if transformed else (False, True):
                name = f"linear score aligned {str(logits)[6:]}{' transformed' if transformed else ''}"
                name += "" if with_entropy else " without entropy"
                config = _config("score", transformed, logits, logits, with_entropy, threads_per_warp)
                found.append(Variant(name, kernel, _types(kernel, logits, logits), *config))
    return found + _scale_variants()


def _scale_variants() -> list[Variant]:
    """Everything that scale_gradients can launch; it does not depend on the size of a warp."""
    found = []
    for dtype, pointer in _POINTERS.items():
        types = {}
        for name in linear_scale_kernel.arg_names[:-1]:
            scalar = "i32" if name.startswith("has_") or name == "hidden_programs" else "i64"
            default = pointer if name.startswith("to_") else "*fp32" if name.endswith("_ptr") else scalar
            types[name] = "*i64" if name == "indices_ptr" else default
        title = f"linear scale aligned {str(dtype)[6:]}"
        found.append(Variant(title, linear_scale_kernel, types, {"BLOCK": _SCALE_BLOCK}, _SCALE_OPTIONS))
    return found


def _types(kernel: triton.JITFunction, logits: torch.dtype, dlogits: torch.dtype) -> dict[str, str]:
    """Argument -> type, from the kernel's own names."""
    special = {"logits_ptr": _POINTERS[logits], "dlogits_ptr": _POINTERS[dlogits]}
    special |= {"tokens_ptr": "*i64", "indices_ptr": "*i64", "first": "i64", "n": "i64"}
    types = {}
    for name in kernel.arg_names:
        if name.islower() or name == "V":
            is_integer = name.startswith("has_") or name in ("V", "kl_estimator")
            default = "i64" if name.endswith("_stride") else "i32" if is_integer else "fp32"
            types[name] = special.get(name, "*fp32" if name.endswith("_ptr") else default)
    return types


class _HeadScalars(NamedTuple):
    """The head as the kernels take it."""

    transformed: bool
    bias: Tensor | None
    has_bias: int
    logit_scale: float
    softcap: float
    z_scale: float
    scale: float
    factor: float


def _scalars(head: Head) -> _HeadScalars:
    transformed = head.bias is not None or head.softcap is not None
    z_scale = 1.0 / head.temperature if transformed else head.factor
    softcap = 0.0 if head.softcap is None else float(head.softcap)
    numbers = float(head.logit_scale), softcap, z_scale, math.log2(math.e) * z_scale, head.factor
    return _HeadScalars(transformed, head.bias, int(head.bias is not None), *numbers)


def _or(x: Tensor | None, address: Tensor) -> Tensor:
    """A tensor, or an address of the same type that will not be read."""
    return address if x is None else x


ChunkRows = tuple[
    Tensor | None, int
]  # indices of the counted tokens (None: all), and of a chunk's first row among them


def _score(
    logits: Tensor,
    tokens: Tensor,
    chunk_rows: ChunkRows,
    head: Head,
    logprobs: Tensor,
    entropy: Tensor | None,
    statistics: Tensor | None,
) -> None:
    head_scalars, (rows, V), dtype, (indices, first) = _scalars(head), logits.shape, logits.dtype, chunk_rows
    with_entropy = entropy is not None
    keywords = _keywords("score", head_scalars.transformed, dtype, dtype, with_entropy, warp_size(logits.device))
    with device_guard(logits):
        linear_score_kernel.run(
            logits,
            tokens,
            _or(indices, tokens),
            _or(head_scalars.bias, logprobs),
            logprobs,
            _or(entropy, logprobs),
            _or(statistics, logprobs),
            int(indices is not None),
            head_scalars.has_bias,
            int(with_entropy),
            int(statistics is not None),
            head_scalars.logit_scale,
            head_scalars.softcap,
            head_scalars.z_scale,
            head_scalars.scale,
            first,
            0 if statistics is None else statistics.stride(0),
            V,
            logits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _policy(
    logits: Tensor,
    dlogits: Tensor,
    # tokens, old_logprobs, advantages, weights, ref_logprobs, token_weight
    per_token: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None],
    chunk_rows: ChunkRows,
    options: LossOptions,
    head: Head,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    head_scalars, (rows, V), (indices, first) = _scalars(head), logits.shape, chunk_rows
    tokens, old, advantages, weights, ref, token_weight = per_token
    with_kl = ref is not None and options.kl_coef != 0
    keywords = _keywords(
        "policy", head_scalars.transformed, logits.dtype, dlogits.dtype, True, warp_size(logits.device)
    )
    with device_guard(logits):
        linear_policy_kernel.run(
            logits,
            dlogits,
            tokens,
            _or(indices, tokens),
            _or(head_scalars.bias, logprobs),
            _or(old, logprobs),
            advantages,
            _or(weights, logprobs),
            _or(ref, logprobs),
            _or(token_weight, logprobs),
            logprobs,
            entropy,
            int(indices is not None),
            head_scalars.has_bias,
            int(old is not None),
            int(weights is not None),
            int(with_kl),
            int(token_weight is not None),
            head_scalars.logit_scale,
            head_scalars.softcap,
            head_scalars.z_scale,
            head_scalars.scale,
            head_scalars.factor,
            1.0 - options.clip_low,
            1.0 + options.clip_high,
            math.inf if options.dual_clip is None else float(options.dual_clip),
            float(options.log_ratio_clamp),
            float(options.entropy_coef),
            float(options.kl_coef) if with_kl else 0.0,
            KL_ESTIMATORS.index(options.kl_estimator),
            first,
            V,
            logits.stride(0),
            dlogits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _gradient(
    logits: Tensor,
    dlogits: Tensor,
    tokens: Tensor,
    chunk_rows: ChunkRows,
    g: Tensor | None,  # d loss / d logp
    h: Tensor | None,  # d loss / d H
    head: Head,
    statistics: Tensor,
) -> None:
    head_scalars, (rows, V), (indices, first) = _scalars(head), logits.shape, chunk_rows
    keywords = _keywords(
        "gradient", head_scalars.transformed, logits.dtype, dlogits.dtype, True, warp_size(logits.device)
    )
    with device_guard(logits):
        linear_gradient_kernel.run(
            logits,
            dlogits,
            tokens,
            _or(indices, tokens),
            _or(head_scalars.bias, statistics),
            _or(g, statistics),
            _or(h, statistics),
            statistics,
            int(indices is not None),
            head_scalars.has_bias,
            int(g is not None),
            int(h is not None),
            head_scalars.logit_scale,
            head_scalars.softcap,
            head_scalars.scale,
            head_scalars.factor,
            first,
            statistics.stride(0),
            V,
            logits.stride(0),
            dlogits.stride(0),
            grid=(rows,),
            warmup=False,
            **keywords,
        )


def _loss(
    logprobs: Tensor, entropy: Tensor, tensors: LossTensors, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, statistics and 1 / divisor of the loss."""
    if tensors.old_logprobs is None:
        tensors = tensors._replace(old_logprobs=logprobs)
    wanted, names = wanted_stats(True, True, False, tensors, options)
    loss, stats, workspace = loss_launch.forward(
        logprobs, entropy, None, tensors, options, (False, False, False), wanted
    )
    return loss, named_stats(stats, names), workspace[0]


def scale_gradients(
    gradients: Gradients,
    upstream: Tensor | None,  # []; so is the next one, and the gradients are multiplied by both
    inverse: Tensor | None,
    indices: Tensor | None,  # the rows in gradients.hidden, None for all
    shapes_and_dtypes: list[ShapeAndDtype | None],  # of hidden, weight and bias
) -> list[Tensor | None] | None:
    """Return the gradients of hidden, weight and bias; None where the kernel is unsupported or not needed."""
    pairs = list(zip(gradients, shapes_and_dtypes, strict=True))
    dtype = next(like[1] for x, like in pairs if x is not None and like is not None)
    if dtype not in _POINTERS or (upstream is not None and upstream.dtype is not torch.float32):
        return None
    if upstream is None and inverse is None and indices is None and dtype is torch.float32:
        return None
    results: list[Tensor | None] = [None, None, None]
    sizes, source, target = [0, 0, 0], None, None
    for i, (x, like) in enumerate(pairs):
        if x is None or like is None:
            continue
        shape, its_dtype = like
        if its_dtype is not dtype or x.dtype is not torch.float32 or not x.is_contiguous() or x.data_ptr() & 15:
            return None
        source, target = x, torch.empty(*shape, dtype=dtype, device=x.device)
        results[i], sizes[i] = target, target.numel()
    if source is None or target is None:  # no gradient is wanted
        return results
    n = N = D = 0
    hidden_programs = -(-sizes[0] // _SCALE_BLOCK)
    if gradients.hidden is not None:
        n, D = gradients.hidden.shape
        N = sizes[0] // D if D else 0
        if indices is not None:
            if D % _SCALE_UNIT or not n:
                return None
            hidden_programs = N * -(-D // _SCALE_BLOCK)
    programs = hidden_programs - (-sizes[1] // _SCALE_BLOCK) - (-sizes[2] // _SCALE_BLOCK)
    if programs:
        with device_guard(source):
            linear_scale_kernel.run(
                *(source if x is None else x for x in gradients),
                *(target if x is None else x for x in results),
                _any_index(source.device) if indices is None else indices,
                source if upstream is None else upstream,
                source if inverse is None else inverse,
                int(indices is not None),
                int(upstream is not None),
                int(inverse is not None),
                n,
                N,
                D,
                sizes[1],
                sizes[2],
                hidden_programs,
                _SCALE_BLOCK,
                grid=(programs,),
                warmup=False,
                **_SCALE_OPTIONS,
            )
    return results


@functools.cache
def _any_index(device: torch.device) -> Tensor:
    """An address that will not be read."""
    return torch.empty((), dtype=torch.int64, device=device)


EPILOGUE = IndexedEpilogue(
    name="triton",
    native=lambda device: True,
    in_place=False,
    scratch_bytes=lambda weight, softcap: 0,
    score=_score,
    policy=_policy,
    gradient=_gradient,
    loss=_loss,
    token_weights=loss_launch.token_weights,
    scale_gradients=scale_gradients,
)
