"""Measurements for decisions that depend on the GPU, a line of JSON for each.

    python bench/choices.py RECORD.jsonl [--commit HASH] [--budget SECONDS] [--tiny]

- cudnn: SDPA with a new shape at each call, with cuDNN's kernel allowed or not. It builds a plan for each new shape,
  and packs and key lengths of sampling have new shapes all the time.
- grouped: SDPA with grouped queries in fp32, or with a window in bf16, as they are or with keys and values repeated.
- precision: fp32 products with float32_matmul_precision "highest" and "high", and whether the probe accepts a model.
- probe: logits of packed rows and of rows one by one, and their difference as a share of the probe's bound, at
  depths from 2 to 32. A share above 1 means that the bound is too low for this GPU.
- chunks: time and memory of the linear loss against its chunk_bytes.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import json_lines
import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import ppo_fast as ppo
from ppo_fast.llm.models.head import decoder_of, head_of
from ppo_fast.llm.models.modes import autocast
from ppo_fast.llm.models.probe import PROBE_LENGTHS, detect_head, rounding_bound
from ppo_fast.llm.packing.attention import Layout, packed_attention

MIB = 2**20


class Sizes(NamedTuple):
    """Sizes of the measurements on a GPU, and in a dry run."""

    shapes: int  # new shapes of SDPA
    heads: tuple[int, int, int]  # of queries, of keys, and elements of each
    lengths: tuple[int, ...]
    gemm: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    vocabulary: int
    head: tuple[int, int, int]  # N, D, V of the linear loss
    chunks: tuple[int | None, ...]


GPU = Sizes(
    shapes=24,
    heads=(32, 8, 64),
    lengths=(512, 2048),
    gemm=4096,
    depths=(2, 4, 8, 16, 32),
    widths=(512, 2048),
    vocabulary=32000,
    head=(8192, 1536, 151936),  # Qwen2.5-1.5B
    chunks=(None, 256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB, 4096 * MIB),
)
TINY = Sizes(3, (4, 2, 8), (6,), 16, (2,), (32,), 130, (6, 16, 130), (None, 1))


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def once_ms(run: Callable[[], Any]) -> float:
    """Measure one call and the wait for it on the host, which builds the plans."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    samples = measure.samples_ms(run, device, seconds=0.5, most=30)
    return {
        "median_ms": statistics.median(samples),
        "times_ms": [round(ms, 4) for ms in samples],
        "peak_extra_bytes": measure.peak_extra_bytes(run, device),
    }


# cuDNN


def learn_shapes(sizes: Sizes) -> Iterator[Callable[[], Any]]:
    """Forward and backward of causal attention over buckets of new shapes."""
    heads, _, width = sizes.heads
    for i in range(sizes.shapes):
        shape = (2 + i % 5, heads, sizes.lengths[0] // 2 + 3 * i + 1, width)
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

        def run(inputs: list[Tensor] = inputs) -> None:
            F.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()

        yield run


def sample_shapes(sizes: Sizes) -> Iterator[Callable[[], Any]]:
    """One query for each row, a cache that has grown by one, and the mask of padding on the left."""
    heads, groups, width = sizes.heads
    for i in range(sizes.shapes):
        keys = sizes.lengths[0] + i
        q = torch.randn(16, heads, 1, width, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 16, groups, keys, width, device="cuda", dtype=torch.bfloat16)
        mask = torch.rand(16, 1, 1, keys, device="cuda") < 0.9

        def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> None:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        yield run


def new_shapes(make: Callable[[Sizes], Iterator[Callable[[], Any]]], sizes: Sizes, *, cudnn: bool) -> dict[str, Any]:
    """Milliseconds of the first call at each shape, and of the second."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        times = [(once_ms(run), once_ms(run)) for run in make(sizes)][1:]  # the first shape loads libraries
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    first, second = ([round(ms, 4) for ms in column] for column in zip(*times, strict=True))
    medians = {"median_first_ms": statistics.median(first), "median_second_ms": statistics.median(second)}
    return {**medians, "first_ms": first, "second_ms": second}


def measure_cudnn(writer: json_lines.Writer, sizes: Sizes) -> None:
    for name, make in (("learning", learn_shapes), ("sampling", sample_shapes)):
        for cudnn in (False, True):
            about = {"choice": "cudnn", "case": name, "cudnn": "allowed" if cudnn else "not allowed"}
            writer.measure(about, lambda make=make, cudnn=cudnn: new_shapes(make, sizes, cudnn=cudnn))


# Grouped queries


def grouped(sizes: Sizes, length: int, dtype: torch.dtype, *, window: bool, repeat: bool) -> Callable[[], Any]:
    heads, groups, width = sizes.heads
    shapes = [(2, n, length, width) for n in (heads, groups, groups)]
    q, k, v = (torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes)
    mask = None
    if window:
        mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril().triu(1 - max(1, length // 4))

    def run() -> None:
        wide = [x.repeat_interleave(heads // groups, dim=1) if repeat else x for x in (k, v)]
        out = F.scaled_dot_product_attention(q, *wide, attn_mask=mask, is_causal=mask is None, enable_gqa=not repeat)
        torch.autograd.grad(out.sum(), (q, k, v))

    return run


def measure_grouped(writer: json_lines.Writer, sizes: Sizes, device: torch.device) -> None:
    for dtype, window in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        for length in sizes.lengths:
            for repeat in (False, True):
                about = {"choice": "grouped", "dtype": label(dtype), "window": window, "length": length}
                writer.measure(
                    {**about, "keys": "repeated" if repeat else "as they are"},
                    lambda d=dtype, w=window, n=length, r=repeat: timed(
                        grouped(sizes, n, d, window=w, repeat=r), device
                    ),
                )


# The probe


def llama(sizes: Sizes, depth: int, width: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a.float() - b.float()).abs().max().item()


@torch.no_grad()
def noise(model: Any, device: torch.device) -> dict[str, float]:
    """Compute what the probe checks: differences of rows from head times hidden states, and from a packed row."""
    ids = (torch.arange(sum(PROBE_LENGTHS), device=device) * 7919 + 1) % model.config.vocab_size
    rows = [row.unsqueeze(0) for row in ids.split(PROBE_LENGTHS)]

    def one_by_one() -> Tensor:
        return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])

    own = one_by_one()
    states = torch.cat([decoder_of(model)(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE_LENGTHS]).unsqueeze(0)
    layout = Layout.from_lengths(list(PROBE_LENGTHS), device).arguments()
    with packed_attention(model):
        packed = model(input_ids=ids.unsqueeze(0), position_ids=positions, use_cache=False, **layout).logits[0]
    bound, eps = rounding_bound(model, one_by_one, own), torch.finfo(own.dtype).eps * own.float().abs().max().item()
    found = {"linear": apart(head_of(model)(states), own), "packed": apart(packed, own)}
    shares = {f"share_of_bound_{name}": x / bound for name, x in found.items()}
    return {**shares, **{f"eps_of_{name}": x / eps for name, x in found.items()}}


def probe_noise(sizes: Sizes, depth: int, width: int, kind: str, device: torch.device) -> dict[str, float]:
    model = llama(sizes, depth, width, device)
    if kind == "bfloat16 weights":
        model = model.bfloat16()
    with autocast("bfloat16" if kind == "bfloat16 autocast" else "float32", model.device):
        return noise(model, device)


def verdict(sizes: Sizes, name: str, device: torch.device) -> dict[str, Any]:
    """The rate of an fp32 product, and the probe's result for a model, under a matmul precision."""
    with precision(name):
        model = llama(sizes, sizes.depths[-1], sizes.widths[0], device)
        head = detect_head(model)
        rate = measure.gemm_tflop_per_s(device, torch.float32, *[sizes.gemm] * 3)
        return {"tflop_per_s": rate, "linear": head.linear, "packed": head.packed, **noise(model, device)}


def measure_probe(writer: json_lines.Writer, sizes: Sizes, device: torch.device) -> None:
    for name in ("highest", "high"):
        about = {"choice": "precision", "float32_matmul_precision": name}
        writer.measure(about, lambda name=name: verdict(sizes, name, device))
    for kind in ("float32", "bfloat16 autocast", "bfloat16 weights"):
        for width, depth in itertools.product(sizes.widths, sizes.depths):
            about = {"choice": "probe", "kind": kind, "depth": depth, "width": width}
            writer.measure(about, lambda k=kind, d=depth, w=width: probe_noise(sizes, d, w, k, device))


# The linear loss


def chunked(sizes: Sizes, dtype: torch.dtype, chunk_bytes: int | None, device: torch.device) -> dict[str, Any]:
    """A step of linear_ppo_loss: the trainer's in fp32, since norms end in fp32 under autocast, too; or all in bf16."""
    N, D, V = sizes.head
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, device=device, dtype=dtype).mul_(D**-0.5).requires_grad_()
    tokens, old, advantages = torch.randint(0, V, (N,), device=device), *torch.randn(2, N, device=device)

    def run() -> None:
        hidden.grad = weight.grad = None
        ppo.linear_ppo_loss(hidden, weight, tokens, old - 12, advantages, chunk_bytes=chunk_bytes).loss.backward()

    return {"N": N, "D": D, "V": V, **timed(run, device)}


def measure_chunks(writer: json_lines.Writer, sizes: Sizes, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for chunk_bytes in sizes.chunks:
            about = {"choice": "chunks", "dtype": label(dtype), "chunk_bytes": chunk_bytes}
            writer.measure(about, lambda d=dtype, c=chunk_bytes: chunked(sizes, d, c, device))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file for the measurements, one line of JSON each")
    parser.add_argument("--commit", default="unknown", help="commit to record")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which the rest is skipped")
    parser.add_argument("--tiny", action="store_true", help="small tensors, for a dry run")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU on this machine")
    device, sizes = torch.device("cuda"), TINY if options.tiny else GPU
    writer = json_lines.Writer(options.record, options.commit, options.budget)
    measure_cudnn(writer, sizes)
    measure_grouped(writer, sizes, device)
    measure_probe(writer, sizes, device)
    measure_chunks(writer, sizes, device)
    print(f"the record is {options.record}")
    return 1 if writer.failed else 0


if __name__ == "__main__":
    sys.exit(main())
