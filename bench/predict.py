"""Predicted time on a GPU, by the limiting resource, beside the measured time.

    python bench/predict.py [--write]

The time of a kernel is that of the resource that it uses longest:

- memory: bytes by design over bandwidth;
- issue slots: instructions of the inner loop over what the schedulers issue;
- MUFU: special-function instructions of the inner loop (ex2, lg2, rcp, ...) over what their units compute;
- latency: round trips to memory that wait for each other, where a launch is too small to hide them.

Kernels of an operation follow each other, so their times are added, then FLOPs over the throughput of the tensor cores
and a constant for each launch. The limit of an operation is the resource with the largest share of its time.

Instructions are counted in the binary that triton.compile makes for each GPU (loops.py), divided by the elements that
a thread has in one pass of the loop. So every figure is falsifiable: `--write` counts again and stores the counts in
bench/results/static/loops.json, where static.py, which makes the page, finds them.

Datasheet numbers are multiplied by the shares that an H200 reached in October 2026 with a large copy (4.3 of 4.8 TB/s)
and an 8192^3 bf16 product (788 of 989 TFLOP/s), on every machine: an assumption, for all but the H200.
"""

import collections
import datetime
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import json_lines
from loops import Loop, amd_loops, cuda_loops

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BANDWIDTH_SHARE, GEMM_SHARE = 4.3 / 4.8, 788 / 989
LAUNCH_US = 3.0  # of one kernel in a CUDA graph
LATENCY_US = 0.7  # of a load that misses the caches, with the work on what it brings: assumed for every machine


class Machine(NamedTuple):
    name: str
    arch: str  # of the code that is counted
    tb_per_s: float
    tflop_per_s: float  # bf16, dense
    units: int  # multiprocessors, or compute units
    ghz: float
    issue_lanes: int  # thread instructions that a unit issues in a clock
    mufu_lanes: int  # special-function results of a unit in a clock
    source: str


# A multiprocessor has 4 schedulers, each of which issues an instruction of 32 threads in a clock, and 16 lanes for
# special functions (CUDA programming guide, throughput of native arithmetic instructions). Units of their own for fp32,
# integers or addresses, which A100 has half as many of as of issue lanes, are not modelled. A CDNA3 compute unit has
# 4 SIMDs of 16 lanes, and a quarter of that for transcendental functions. Clocks are those that the datasheets' TFLOP/s
# imply.
MACHINES = (
    Machine("H200", "sm_90", 4.8, 989, 132, 1.83, 128, 16, "NVIDIA H200 datasheet, SXM5; H100 whitepaper for the SM"),
    Machine("B200", "sm_100", 8.0, 2250, 148, 1.85, 128, 16, "NVIDIA HGX B200 datasheet, one GPU of eight"),
    Machine("A100", "sm_80", 2.039, 312, 108, 1.41, 128, 16, "NVIDIA A100 datasheet, SXM4 80 GB; A100 whitepaper"),
    Machine("RTX 4090", "sm_89", 1.008, 165.2, 128, 2.52, 128, 16, "NVIDIA Ada whitepaper; bf16 with fp32 sums"),
    Machine("MI300X", "gfx942", 5.3, 1307, 304, 2.1, 64, 16, "AMD Instinct MI300X data sheet; CDNA3 whitepaper"),
)


class Kernel(NamedTuple):
    """The part of a variant's code that works on elements."""

    variant: str
    loops: str  # "store": those that write global memory; "all"; "last" in the code; "none": the whole program
    branches: int = 1  # versions of the code in it, of which a program runs one


KERNELS = {
    "token_logprobs forward": Kernel("token_logprobs fwd bfloat16 1x4096 aligned", "all"),
    "token_logprobs backward": Kernel("token_logprobs bwd bfloat16 1x4096 aligned", "none", branches=2),
    "linear policy": Kernel("linear policy aligned float32 bfloat16", "all"),
    "linear score": Kernel("linear score aligned float32", "last"),
    "loss forward": Kernel("loss forward flat fp32", "none"),
    "loss backward": Kernel("loss backward fp32", "none"),
    "gae rows": Kernel("gae long rows float32 aligned", "store"),
    "gae rows compose": Kernel("gae long rows compose float32 aligned", "last"),
    "gae columns": Kernel("gae columns float32 aligned", "store"),
    "gae columns compose": Kernel("gae columns compose float32 aligned", "last"),
    "rlhf_advantages": Kernel("rlhf_advantages long rows float32 aligned", "store"),
    "rlhf_advantages compose": Kernel("rlhf_advantages long rows compose float32 aligned", "last"),
    "shape_rewards": Kernel("shape_rewards float32 aligned", "store"),
    "moments": Kernel("moments float32 aligned", "last"),
    "whiten": Kernel("whiten float32 aligned", "store"),
}


class Cost(NamedTuple):
    """Of one element."""

    instructions: float
    mufu: float


Costs = dict[str, dict[str, Cost]]  # kernel -> arch -> cost


class Part(NamedTuple):
    """One kernel of an operation."""

    kernel: str
    bytes_each: float  # of one element, by design
    round_trips: int = 0  # that wait for each other, in one program; 0 where a launch has enough programs to hide them


class Task(NamedTuple):
    operation: str  # as in the records of `pytest bench`
    shape: str
    elements: int
    element: str
    parts: tuple[Part, ...]
    flops: int = 0
    launches: int = 1

    @property
    def bytes_each(self) -> float:
        return sum(part.bytes_each for part in self.parts)


def _gae_tasks() -> Iterator[Task]:
    """A second launch reads its data from the second level cache."""
    step = "step: 9 read, 8 written"
    yield Task("gae", "B=4096 T=128", 4096 * 128, step, (Part("gae rows", 17, 1),))
    for b, t in ((256, 2048), (8, 16384)):
        spans = t // 512
        first = Part("gae rows compose", 9 * (spans - 1) / spans, 4)
        second = Part("gae rows", 8 + 9 / spans, math.ceil((spans - 1) / 16) + 4)
        yield Task("gae", f"B={b} T={t}", b * t, step, (first, second), launches=2)
    for t, n in ((128, 256), (128, 4096)):
        yield Task("gae, time-major", f"T={t} N={n}", t * n, step, (Part("gae columns", 17, t // 8),))
    first, second = Part("gae columns compose", 9 * 31 / 32, 8), Part("gae columns", 8 + 9 / 32, 2 + 8)
    yield Task("gae, time-major", "T=2048 N=256", 2048 * 256, step, (first, second), launches=2)


def _advantages_tasks() -> Iterator[Task]:
    for b, t in ((64, 1024), (64, 4096)):
        shape, n, whiten = f"B={b} T={t}", b * t, Part("whiten", 9, 2)
        yield Task("shape_rewards", shape, n, "token: 9 read, 8 written", (Part("shape_rewards", 17, 2),))
        yield Task("masked_whiten", shape, n, "element: 10 read, 4 written", (Part("moments", 5, 1), whiten), 0, 2)
        token = "token: 13 read, 16 written, 9 to whiten"
        if t == 1024:
            parts: tuple[Part, ...] = (Part("rlhf_advantages", 29, 1 + 8), whiten)
        else:
            first = Part("rlhf_advantages compose", 13 * 7 / 8, 1 + 4)
            parts = first, Part("rlhf_advantages", 16 + 13 / 8, 1 + 1 + 4), whiten
        yield Task("rlhf_advantages", shape, n, token, parts, launches=len(parts))


def tasks() -> Iterator[Task]:
    """The shapes that `pytest bench` runs on a GPU."""
    for v in (32000, 128256, 151936):
        n = 16384
        shape, forward = f"N={n} V={v}", Part("token_logprobs forward", 2)
        yield Task("token_logprobs and entropy, forward", shape, n * v, "bf16 logit: read", (forward,))
        both = forward, Part("token_logprobs backward", 4)
        element = "bf16 logit: read, read, write"
        yield Task("token_logprobs and entropy, forward and backward", shape, n * v, element, both, launches=2)
    for n, d, v in ((2048, 4096, 128256), (8192, 4096, 128256), (16384, 4096, 128256)):
        shape, chunks = f"N={n} D={d} V={v}", max(1, n // 4096)
        yield Task(
            "linear_ppo_loss, forward and backward",
            shape,
            n * v,
            "fp32 logit read twice, bf16 dlogit written, by the row kernel",
            (Part("linear policy", 10),),
            6 * n * d * v,
            6 * chunks,
        )
        yield Task(
            "linear_logprobs, forward without gradients",
            shape,
            n * v,
            "fp32 logit read by the row kernel",
            (Part("linear score", 4),),
            2 * n * d * v,
            2 * chunks,
        )
    yield from _gae_tasks()
    for b, t in ((8, 2048), (8, 8192)):
        parts = Part("loss forward", 33, 1), Part("loss backward", 16, 1)
        yield Task("ppo_loss, forward and backward", f"B={b} T={t}", b * t, "token: 33 read, 16 written", parts, 0, 3)
    yield from _advantages_tasks()


def part_ms(part: Part, elements: int, machine: Machine, costs: Costs) -> dict[str, float]:
    """Milliseconds for which a kernel keeps each resource busy. Without counts, only those that need none."""
    found = {
        "memory": elements * part.bytes_each / (machine.tb_per_s * BANDWIDTH_SHARE) / 1e9,
        "latency": part.round_trips * LATENCY_US / 1e3,
    }
    cost = costs.get(part.kernel, {}).get(machine.arch)
    if cost is not None:
        clocks_per_ms = machine.units * machine.ghz * 1e6
        found["issue slots"] = elements * cost.instructions / (machine.issue_lanes * clocks_per_ms)
        found["MUFU"] = elements * cost.mufu / (machine.mufu_lanes * clocks_per_ms)
    return found


def spent_ms(task: Task, machine: Machine, costs: Costs) -> dict[str, float]:
    """Milliseconds that go to each resource; their sum is the predicted time."""
    spent: dict[str, float] = collections.defaultdict(float)
    for part in task.parts:
        resource, ms = max(part_ms(part, task.elements, machine, costs).items(), key=lambda item: item[1])
        spent[resource] += ms
    spent["tensor cores"] += task.flops / (machine.tflop_per_s * GEMM_SHARE) / 1e9
    spent["launches"] += task.launches * LAUNCH_US / 1e3
    return dict(spent)


def predicted_ms(task: Task, machine: Machine, costs: Costs | None = None) -> float:
    return sum(spent_ms(task, machine, costs or {}).values())


def measured_ms(results: Path) -> dict[tuple[str, str, str], float]:
    """(machine, operation, shape) -> our median on a GPU; a small operation's is that of its CUDA graph."""
    found: dict[tuple[str, str, str], float] = {}
    for path in sorted((*results.glob("*/*.json"), *results.glob("*/*.jsonl"))):
        record = json_lines.read(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
        gpu = (record.get("machine_info") or {}).get("gpu")
        names = [m.name for m in MACHINES if gpu and m.name in gpu["name"]]
        for row in record.get("benchmarks", []) if names else []:
            info = row["extra_info"]
            if info.get("provider") == "ppo_fast" and info.get("samples_ms"):
                samples = info.get("replay_ms") or info["samples_ms"]
                found[names[0], info["operation"], info["shape"]] = statistics.median(samples)
    return found


def known_costs(results: Path) -> tuple[Costs, str]:
    """The counts of the last --write, and what they were counted in."""
    path = results / "static" / "loops.json"
    if not path.exists():
        return {}, "nothing: run `python bench/predict.py --write`"
    record = json.loads(path.read_text())
    costs = {k: {arch: Cost(*x) for arch, x in row.items()} for k, row in record["kernels"].items()}
    return costs, f"triton {record['triton']}, commit {record['commit']}, {record['date']}"


def shown(ms: float) -> str:
    return f"{1e3 * ms:.3g} us" if ms < 1 else f"{ms:.3g} ms"


def cell(task: Task, machine: Machine, costs: Costs) -> str:
    spent = spent_ms(task, machine, costs)
    return f"{shown(sum(spent.values()))}, {max(spent, key=lambda resource: spent[resource])}"


def page(results: Path) -> list[str]:
    """Markdown."""
    known = measured_ms(results)
    costs, counted_in = known_costs(results)
    lines = [
        "## Predicted times and the resource that limits them",
        "",
        "By `bench/predict.py`, which says how: bytes by design, instructions and special-function instructions (MUFU)",
        f"of the inner loops, FLOPs, {LAUNCH_US:g} us for each launch, {LATENCY_US:g} us for each round trip to memory",
        f"that has to wait for another. Taken are {100 * BANDWIDTH_SHARE:.0f} % of a datasheet's bandwidth and"
        f" {100 * GEMM_SHARE:.0f} % of its dense",
        "bf16 TFLOP/s, which is what an H200 reached in a large copy and an 8192^3 product; for other machines that",
        f"is an assumption. Instructions were counted in: {counted_in}.",
        "",
    ]
    lines += [
        f"- {m.name} ({m.arch}): {m.tb_per_s:g} TB/s, {m.tflop_per_s:g} TFLOP/s, {m.units} units at {m.ghz:g} GHz, each"
        f" with {m.issue_lanes} lanes to issue and {m.mufu_lanes} for special functions ({m.source})"
        for m in MACHINES
    ]
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
            f"{task.bytes_each:.3g} ({task.element})",
            f"{task.flops / 1e12:.3g}" if task.flops else "",
            *(cell(task, machine, costs) for machine in MACHINES),
            ", ".join(found) or "not yet measured",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Instructions / MUFU instructions for each element:", ""] if costs else []
    for kernel, row in costs.items():
        counts = ", ".join(f"{arch} {x.instructions:.1f} / {x.mufu:.2f}" for arch, x in row.items())
        lines.append(f"- {kernel} ({KERNELS[kernel].variant}): {counts}")
    return lines


def cost_of(kernel: Kernel, whole: Loop, inner: list[Loop], elements: float) -> Cost:
    """elements: of a thread in one pass of a loop, or in a whole program."""
    stores = [loop for loop in inner if loop.stores]
    chosen = {"none": [whole], "all": inner, "last": inner[-1:], "store": stores}[kernel.loops]
    if not chosen:
        raise ValueError(f"{kernel.variant} has no such loop: {kernel.loops}")
    share = elements * kernel.branches
    return Cost(sum(loop.instructions for loop in chosen) / share, sum(loop.mufu for loop in chosen) / share)


def count() -> Costs:
    """Compile the kernels for every machine and count instructions."""
    import static  # imports this file for its page

    found: Costs = {}
    for machine in MACHINES:
        target = static.TARGETS[machine.arch]
        listed = static.listed(target.warp_size)
        for name, kernel in KERNELS.items():
            variant = listed[kernel.variant]
            sizes = [x for key, x in variant.constexprs.items() if key in ("R", "C", "ROWS", "W", "BLOCK")]
            asm = static.compile_variant(variant, target).asm
            if target.backend == "hip":
                loops = amd_loops(asm["amdgcn"])
            else:
                loops = cuda_loops(static.dump(asm["cubin"], "--dump-sass"))
            elements = math.prod(sizes) / (target.warp_size * variant.options["num_warps"])
            found.setdefault(name, {})[machine.arch] = cost_of(kernel, *loops, elements)
    return found


def write(costs: Costs) -> None:
    import static

    facts = {
        "triton": static.triton.__version__,
        "commit": static.git("rev-parse", "--short", "HEAD")
        + (", changed" if static.git("status", "--porcelain", "kernels") else ""),
        "date": datetime.date.today().isoformat(),
    }
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in costs.items()]
    text = json.dumps(facts)[:-1] + ', "kernels": {\n' + ",\n".join(rows) + "\n}}\n"
    (RESULTS / "static" / "loops.json").write_text(text)
    print(f"loops.json is in {RESULTS / 'static'}")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write(count())
    print("\n".join(page(RESULTS)))
