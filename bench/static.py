"""The ahead-of-time gate: compiles every variant of every Triton kernel for several GPUs, on a machine with none.

    python bench/static.py [--write] [--quiet] [--arch sm_90 gfx942] [--jobs 2] [--every 8] [kernel ...]

The variants are those of captured launches: the random calls of the test suite run without executing a kernel, and what
Triton would specialise is compiled. Prints registers, shared memory (LDS on AMD), spills, the widths of global loads,
and instructions and barriers of the longest innermost loop, read from the binary (for AMD from the assembly). Exits
with 1 if a variant spills, if one whose name says `aligned` has no load of 16 bytes, or if a loop of time-major gae has
a barrier. --every 8 takes each eighth variant. --write stores the numbers in bench/results/static/, a record for each
version of Triton, and makes the page there again, with the predictions of predict.py. Triton's own cache makes a second
run quick; --page makes the page from the records alone.

For another Triton: python -m venv .venv-t36, .venv-t36/bin/pip install "torch>=2.11" "triton==3.6.0" "numpy<2.4", then
the same command with .venv-t36/bin/python.
"""

import argparse
import collections
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import json_lines  # noqa: F401  # before torch
import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to run from a checkout that is not installed

import predict  # noqa: E402
from loops import Loop, amd_loops, cuda_loops  # noqa: E402

from ppo_fast.kernels.common.launch import Variant, interpreting  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "static"
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
WIDTHS = (128, 64, 32, 16, 8)  # bits of one load


class Report(NamedTuple):
    """Resources of a binary, from its disassembly."""

    registers: int
    shared_bytes: int
    spills: int  # CUDA: bytes of stack and local memory; AMD: spilled vector registers and bytes of scratch
    loads: dict[str, int]  # bits -> number of global load instructions
    loop: int = 0  # instructions of the longest innermost loop; 0 without one, or where it was not counted
    barriers: int = 0  # among them


def is_aligned(name: str) -> bool:
    """Check whether the name of a variant declares wide loads."""
    return re.search(r"(?<!un)aligned", name) is not None


def problems(name: str, arch: str, report: Report) -> list[str]:
    """Return the faults of a binary. 16 bytes a thread are required for 32 threads; AMD's 64 load as much with 8."""
    found = [f"spills {report.spills}"] if report.spills else []
    due = 64 if arch.startswith("gfx") else 128
    narrow = is_aligned(name) and not any(report.loads.get(str(bits)) for bits in WIDTHS if bits >= due)
    found += [f"has no load of {due} bits"] if narrow else []
    return found + (["has a barrier in its loop"] if "columns" in name and report.barriers else [])


def pretend_hip() -> None:
    """Make the launchers choose the variants of an AMD GPU, in a process that compiles for one."""
    torch.version.hip = "pretended"
    from ppo_fast.kernels.linear import launch as linear
    from ppo_fast.kernels.logprobs import launch as logprobs

    for module in (linear, logprobs):
        module.warp_size = lambda device: TARGETS["gfx942"].warp_size


@functools.cache
def launches() -> dict[str, Any]:
    """Name of a variant -> its launch, in a fixed order."""
    from support import variants

    listed, found = variants.listed(64 if torch.version.hip else 32), variants.captured()
    names = {key: listed[key].name if key in listed else variants.name(found[key].launch) for key in found}
    return {names[key]: found[key].launch for key in sorted(found, key=lambda key: names[key])}


def listed(threads_per_warp: int) -> dict[str, Variant]:
    """The variants that the launchers list, by name."""
    from support import variants

    return {variant.name: variant for variant in variants.listed(threads_per_warp).values()}


def compile_variant(variant: Any, target: GPUTarget) -> Any:
    """Triton's compiled kernel of a listed variant or a captured launch."""
    from support import variants

    return variants.compile_for(variant, target)


def dump(cubin: bytes, option: str) -> str:
    """The output of cuobjdump, which Triton includes, for a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def longest(loops: list[Loop]) -> Loop:
    return max(loops, key=lambda loop: loop.instructions, default=Loop())


def cuda_report(cubin: bytes, shared_bytes: int, *, disassemble: bool) -> Report:
    """Disassembling takes as long as compiling, so it is left out where the loads are not needed."""
    usage = dump(cubin, "--dump-resource-usage")
    sass = dump(cubin, "--dump-sass") if disassemble else ""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads: collections.Counter[str] = collections.Counter()
    for flags in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", sass):
        parts = flags.split(".")
        width = next((bits for bits in WIDTHS if str(bits) in parts), None)
        loads[str(width or (8 if {"U8", "S8"} & {*parts} else 16 if {"U16", "S16"} & {*parts} else 32))] += 1
    loop = longest(cuda_loops(sass)[1])
    spills = numbers["STACK"] + numbers["LOCAL"]
    return Report(numbers["REG"], shared_bytes, spills, dict(loads), loop.instructions, loop.barriers)


def amd_report(assembly: str, shared_bytes: int) -> Report:
    """Scalar registers spill to lanes of vector registers: that is no memory traffic, and is not counted."""
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    registers, spilled, scratch = (int(re.findall(rf"\.{f}:\s+(\d+)", assembly)[0]) for f in fields)
    loads: collections.Counter[str] = collections.Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", assembly):
        size = re.match(r"(?:lds_)?(?:dwordx(\d)|(dword)|(u|s)?(short|b16)|)", kind)
        assert size is not None
        loads[str(32 * int(size[1]) if size[1] else 32 if size[2] else 16 if size[4] else 8)] += 1
    loop = longest(amd_loops(assembly)[1])
    return Report(registers, shared_bytes, spilled + scratch, dict(loads), loop.instructions, loop.barriers)


def report(job: tuple[str, str, bool]) -> Report:
    name, arch, everything = job
    compiled = compile_variant(launches()[name], TARGETS[arch])
    if arch.startswith("gfx"):
        return amd_report(compiled.asm["amdgcn"], compiled.metadata.shared)
    disassemble = everything or is_aligned(name) or "columns" in name
    return cuda_report(compiled.asm["cubin"], compiled.metadata.shared, disassemble=disassemble)


def measure(
    kernels: list[str], archs: list[str], jobs: int, *, everything: bool, every: int = 1
) -> dict[str, dict[str, Report]]:
    """Variant name -> arch -> report. `everything` also reads the loads of variants without a declared width."""
    context = multiprocessing.get_context("spawn")  # Triton's and PyTorch's threads do not survive a fork
    found: dict[str, dict[str, Report]] = {}
    for hip, group in ((False, [a for a in archs if a != "gfx942"]), (True, [a for a in archs if a == "gfx942"])):
        if not group:
            continue
        with concurrent.futures.ProcessPoolExecutor(jobs, context, pretend_hip if hip else None) as pool:
            names = [n for n in pool.submit(names_of_launches).result() if not kernels or any(k in n for k in kernels)]
            work = [(name, arch, everything) for name in names[::every] for arch in group]
            for (name, arch, _), r in zip(work, pool.map(report, work, chunksize=4), strict=True):
                found.setdefault(name, {})[arch] = r
    return found


def names_of_launches() -> list[str]:
    return list(launches())


def cell(r: Report) -> str:
    """Registers, spills if there are any, and the loop if there is one."""
    loop = f" / {r.loop}" if r.loop else ""
    return f"{r.registers}" + (f" +{r.spills} spilled" if r.spills else "") + loop


def table(reports: dict[str, dict[str, Report]]) -> str:
    """Markdown: registers (and what spills) and loop per arch; the rest on sm_90, or the only arch there is."""
    archs = list(next(iter(reports.values()), {}))
    shown = "sm_90" if "sm_90" in archs else archs[0]
    lds = ["LDS bytes, gfx942"] if "gfx942" in archs and shown != "gfx942" else []
    columns = ["variant", *archs, f"shared bytes, {shown}", *lds]
    lines = ["| " + " | ".join([*columns, f"loads of {WIDTHS} bits, {shown}"]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in reports.items():
        memory = [str(row[arch].shared_bytes) for arch in (shown, "gfx942") if arch in row][
            : len(columns) - len(archs) - 1
        ]
        loads = "/".join(str(row[shown].loads.get(str(bits), 0)) for bits in WIDTHS)
        lines.append("| " + " | ".join([name, *(cell(row[arch]) for arch in archs), *memory, loads]) + " |")
    return "\n".join(lines)


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def write(reports: dict[str, dict[str, Report]]) -> None:
    """The record of this Triton, and the README from the record of the Triton that CI pins."""
    facts = {
        "triton": triton.__version__,
        "commit": git("rev-parse", "--short", "HEAD")
        + (", changed" if git("status", "--porcelain", "kernels") else ""),
        "date": datetime.date.today().isoformat(),
        "fields": [*Report._fields],
    }
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in reports.items()]
    text = json.dumps(facts)[:-1] + ', "variants": {\n' + ",\n".join(rows) + "\n}}\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"triton-{triton.__version__}.json").write_text(text)
    write_page()


def write_page() -> None:
    """Write the page from the existing records."""
    records = {r["triton"]: r for r in (json.loads(f.read_text()) for f in sorted(RESULTS.glob("triton-*.json")))}
    widths = ", ".join(map(str, WIDTHS))
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    shown = records.get(pinned[1] if pinned else "", next(reversed(records.values())))
    lines = [
        "# What the kernels cost, known without a GPU",
        "",
        "Made by `python bench/static.py --write`.",
        "",
        *predict.page(ROOT / "bench" / "results"),
        "",
        "## Every kernel in every configuration",
        "",
        "Nothing spills, for any of:",
        "",
        *(
            f"- triton {r['triton']}: {len(r['variants'])} variants, commit {r['commit']}, {r['date']}"
            for r in records.values()
        ),
        "",
        f"Registers per thread / instructions of the longest innermost loop, with triton {shown['triton']} (a kernel",
        f"without a second number has no loop); shared memory, and the number of global loads of {widths} bits.",
        "",
        table({name: {arch: Report(*r) for arch, r in row.items()} for name, row in shown["variants"].items()}),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    print(f"README.md and the records are in {RESULTS}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="parts of the names of variants (default: all)")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="keep the table in bench/results/static/")
    parser.add_argument("--page", action="store_true", help="make only the page again, compile nothing")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile each Nth variant only")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.page:
        write_page()
        return 0
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled; unset it")
    if options.write and (options.kernels or options.every > 1 or options.arch != list(TARGETS)):
        parser.error("--write keeps the whole table: give neither kernels, --every nor --arch")
    everything = options.write or not options.quiet
    reports = measure(options.kernels, options.arch, options.jobs, everything=everything, every=options.every)
    failures = [
        f"{name}, {arch}: {problem}"
        for name, row in reports.items()
        for arch, r in row.items()
        for problem in problems(name, arch, r)
    ]
    if not options.quiet:
        print(table(reports))
    if options.write and not failures:
        write(reports)
    print(
        f"{len(reports)} variants on {', '.join(options.arch)}, triton {triton.__version__}: {len(failures)} problems"
    )
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
