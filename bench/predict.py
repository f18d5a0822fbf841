"""What a GPU should take: bytes and FLOPs by design over what datasheets promise, and beside it what was measured.

    python bench/predict.py

A prediction is launches plus bytes over bandwidth plus FLOPs over throughput: in the linear operations products and row
kernels follow each other. Of a datasheet's numbers this takes the shares that
an H200 reached in October 2026 with a large copy (4.3 of 4.8 TB/s) and an 8192^3 bf16 product (788 of 989 TFLOP/s), on
every machine: an assumption, for all but the H200.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BANDWIDTH_SHARE, GEMM_SHARE = 4.3 / 4.8, 788 / 989
LAUNCH_US = 3.0  # of one kernel in a CUDA graph


class Machine(NamedTuple):
    name: str
    tb_per_s: float
    tflop_per_s: float  # bf16, dense
    source: str


MACHINES = (
    Machine("H100", 3.35, 989, "NVIDIA H100 datasheet, SXM5; half of the TFLOP/s with sparsity"),
    Machine("H200", 4.8, 989, "NVIDIA H200 datasheet, SXM5; half of the TFLOP/s with sparsity"),
    Machine("B200", 8.0, 2250, "NVIDIA HGX B200 datasheet, one GPU of eight; half of the TFLOP/s with sparsity"),
    Machine("MI300X", 5.3, 1307, "AMD Instinct MI300X data sheet; without sparsity"),
)


class Task(NamedTuple):
    operation: str  # as in the records of `pytest bench`
    shape: str
    elements: int
    bytes_each: float  # of one element, by design
    element: str
    flops: int = 0
    launches: int = 1


def tasks() -> Iterator[Task]:
    """The shapes that `pytest bench` runs on a GPU."""
    for v in (32000, 128256, 151936):
        n = 16384
        shape = f"N={n} V={v}"
        yield Task("token_logprobs and entropy, forward", shape, n * v, 2, "bf16 logit: read")
        yield Task(
            "token_logprobs and entropy, forward and backward", shape, n * v, 6, "bf16 logit: read, read, write", 0, 2
        )
    for n, d, v in ((2048, 4096, 128256), (8192, 4096, 128256), (16384, 4096, 128256)):
        shape, chunks = f"N={n} D={d} V={v}", max(1, n // 4096)
        yield Task(
            "linear_ppo_loss, forward and backward",
            shape,
            n * v,
            10,
            "fp32 logit read twice, bf16 dlogit written, by the row kernel",
            6 * n * d * v,
            6 * chunks,
        )
        yield Task(
            "linear_logprobs, forward without gradients",
            shape,
            n * v,
            4,
            "fp32 logit read by the row kernel",
            2 * n * d * v,
            2 * chunks,
        )
    for b, t in ((4096, 128), (256, 2048), (8, 16384)):
        launches = 1 if b >= 256 else 2
        yield Task("gae", f"B={b} T={t}", b * t, 17, "step: 9 read, 8 written", 0, launches)
    for b, t in ((8, 2048), (8, 8192)):
        yield Task("ppo_loss, forward and backward", f"B={b} T={t}", b * t, 49, "token: 33 read, 16 written", 0, 3)
    for b, t in ((64, 1024), (64, 4096)):
        yield Task("rlhf_advantages", f"B={b} T={t}", b * t, 41, "token: 13 read, 16 written, 12 to whiten", 0, 3)


def predicted_ms(task: Task, machine: Machine) -> float:
    bytes_ms = task.elements * task.bytes_each / (machine.tb_per_s * BANDWIDTH_SHARE) / 1e9
    flops_ms = task.flops / (machine.tflop_per_s * GEMM_SHARE) / 1e9
    return bytes_ms + flops_ms + task.launches * LAUNCH_US / 1e3


def measured_ms(results: Path) -> dict[tuple[str, str, str], float]:
    """(machine, operation, shape) -> our median on a GPU; a small operation's is that of its CUDA graph."""
    found: dict[tuple[str, str, str], float] = {}
    for path in sorted(results.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        gpu = (record.get("machine_info") or {}).get("gpu")
        names = [m.name for m in MACHINES if gpu and m.name in gpu["name"]]
        for row in record.get("benchmarks", []) if names else []:
            info = row["extra_info"]
            if info.get("provider") == "ppo_fast" and info.get("samples_ms"):
                samples = info.get("replay_ms") or info["samples_ms"]
                found[names[0], info["operation"], info["shape"]] = statistics.median(samples)
    return found


def shown(ms: float) -> str:
    return f"{1e3 * ms:.3g} us" if ms < 1 else f"{ms:.3g} ms"


def page(results: Path) -> list[str]:
    """Markdown."""
    known = measured_ms(results)
    lines = [
        "## Predicted times",
        "",
        "Bytes by design over bandwidth, plus FLOPs over throughput, plus 3 us for each launch (`bench/predict.py`).",
        f"Taken are {100 * BANDWIDTH_SHARE:.0f} % of a datasheet's bandwidth and {100 * GEMM_SHARE:.0f} % of its dense",
        "bf16 TFLOP/s, which is what an H200 reached in a large copy and an 8192^3 product; for other machines that",
        "is an assumption. Not in it: the latency of a walk over T, which binds gae where rows are few.",
        "",
    ]
    lines += [f"- {m.name}: {m.tb_per_s:g} TB/s, {m.tflop_per_s:g} TFLOP/s ({m.source})" for m in MACHINES]
    columns = ["operation", "shape", "bytes for each", "TFLOP", *(m.name for m in MACHINES), "measured"]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for task in tasks():
        found = [
            f"{shown(known[m.name, task.operation, task.shape])} ({m.name})"
            for m in MACHINES
            if (m.name, task.operation, task.shape) in known
        ]
        cells = [
            task.operation,
            task.shape,
            f"{task.bytes_each:g} ({task.element})",
            f"{task.flops / 1e12:.3g}" if task.flops else "",
            *(shown(predicted_ms(task, machine)) for machine in MACHINES),
            ", ".join(found) or "not yet measured",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(page(ROOT / "bench" / "results")))
    sys.exit(0)
