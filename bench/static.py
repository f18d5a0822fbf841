"""The ahead-of-time gate: compiles every variant of every Triton kernel for several GPUs, on a machine with none.

    python bench/static.py [--write] [--quiet] [--arch sm_90 gfx942] [--jobs 2] [module ...]

A module of kernels/ takes part if it has variants() (kernels/launch.py). Prints registers, shared memory, spills, the
widths of global loads and the instructions of the longest innermost loop, read from the binary (for AMD from the
assembly), and exits with 1 if a variant spills, or if one whose name says `aligned` has no load of 16 bytes. --write
keeps the numbers in bench/results/static/, a record for each version of Triton, and makes the page there anew, with the
predictions of predict.py. Triton's own cache makes a second run quick; --page makes the page from the records alone.

For another Triton: python -m venv .venv-t36, .venv-t36/bin/pip install "torch>=2.11" "triton==3.6.0" "numpy<2.4", then
the same command with .venv-t36/bin/python.
"""

import argparse
import collections
import concurrent.futures
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import predict  # noqa: E402

from ppo_fast.kernels.launch import Variant, interpreting  # noqa: E402

KERNELS = ROOT / "ppo_fast" / "kernels"
RESULTS = ROOT / "bench" / "results" / "static"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDTHS = (128, 64, 32, 16, 8)  # bits of one load


class Report(NamedTuple):
    """What a binary says about itself."""

    registers: int
    shared_bytes: int
    spills: int  # CUDA: bytes of stack and local memory; AMD: spilled vector registers and bytes of scratch
    loads: dict[str, int]  # bits -> number of global load instructions
    loop: int = 0  # instructions of the longest innermost loop; 0 without one, or where nobody looked


def is_aligned(variant: Variant) -> bool:
    """Whether its name promises wide loads."""
    return re.search(r"(?<!un)aligned", variant.name) is not None


def problems(variant: Variant, arch: str, report: Report) -> list[str]:
    """16 bytes a thread are due where 32 threads load together; AMD's 64 move as much with 8."""
    found = [f"spills {report.spills}"] if report.spills else []
    due = 64 if arch.startswith("gfx") else 128
    narrow = is_aligned(variant) and not any(report.loads.get(str(bits)) for bits in WIDTHS if bits >= due)
    return [*found, f"has no load of {due} bits"] if narrow else found


def modules() -> list[str]:
    """Files of kernels/ that define variants(); the text is searched, since importing all of them is slow."""
    return sorted(f.stem for f in KERNELS.glob("*.py") if re.search(r"^def variants\(", f.read_text(), re.MULTILINE))


@functools.cache
def variants(module: str) -> list[Variant]:
    return importlib.import_module(f"ppo_fast.kernels.{module}").variants()


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    signature = {name: variant.types.get(name, "constexpr") for name in variant.kernel.arg_names}
    source = ASTSource(variant.kernel, signature, variant.constexprs)
    options = {name: x for name, x in variant.options.items() if name != "maxnreg" or target.backend == "cuda"}
    return triton.compile(source, target=target, options=options)


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump, which Triton includes, says about a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def cuda_report(cubin: bytes, *, disassemble: bool) -> Report:
    """Disassembling takes as long as compiling, so it is left out where nobody looks at the loads."""
    usage = dump(cubin, "--dump-resource-usage")
    sass = dump(cubin, "--dump-sass") if disassemble else ""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads: collections.Counter[str] = collections.Counter()
    for flags in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", sass):
        parts = flags.split(".")
        width = next((bits for bits in WIDTHS if str(bits) in parts), None)
        loads[str(width or (8 if {"U8", "S8"} & {*parts} else 16 if {"U16", "S16"} & {*parts} else 32))] += 1
    return Report(numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"], dict(loads), cuda_loop(sass))


SASS_BYTES = 16  # of one instruction


def cuda_loop(sass: str) -> int:
    """A loop ends with a branch to an earlier address; an innermost one contains no other. A branch from behind the end
    of the code (a rare case, put out of line) back into it is no loop: it jumps over an EXIT."""
    branch = r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d+\s+)?BRA\S*\s+(?:!?UP\d+,\s*)?0x([0-9a-f]+)"
    jumps = [(int(target, 16), int(at, 16)) for at, target in re.findall(branch, sass)]
    exits = [int(at, 16) for at in re.findall(r"/\*([0-9a-f]+)\*/\s+EXIT", sass)]
    loops = [(a, b) for a, b in jumps if a < b and not any(a < at < b for at in exits)]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max(((last - first) // SASS_BYTES + 1 for first, last in inner), default=0)


def amd_loop(assembly: str) -> int:
    """LLVM's comments say which block is the header of an innermost loop, and which blocks belong to it."""
    counts: collections.Counter[str] = collections.Counter()
    inner, label, loop = set(), "", ""
    for line in assembly.splitlines():
        if block := re.match(r"\.L(BB\d+_\d+):|; %bb", line):
            label, loop = block[1] or "", ""
        if member := re.search(r"in Loop: Header=(BB\d+_\d+)", line):
            loop = member[1]
        elif "Inner Loop Header" in line:
            loop = label
            inner.add(label)
        elif loop and re.match(r"\t[a-z]", line):
            counts[loop] += 1
    return max((counts[header] for header in inner), default=0)


def amd_report(assembly: str) -> Report:
    """Scalar registers spill to lanes of vector registers: that is no memory traffic, and is not counted."""
    fields = ("vgpr_count", "group_segment_fixed_size", "vgpr_spill_count", "private_segment_fixed_size")
    registers, shared, spilled, scratch = (int(re.findall(rf"\.{f}:\s+(\d+)", assembly)[0]) for f in fields)
    loads: collections.Counter[str] = collections.Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", assembly):
        size = re.match(r"(?:lds_)?(?:dwordx(\d)|(dword)|(u|s)?(short|b16)|)", kind)
        assert size is not None
        loads[str(32 * int(size[1]) if size[1] else 32 if size[2] else 16 if size[4] else 8)] += 1
    return Report(registers, shared, spilled + scratch, dict(loads), amd_loop(assembly))


def report(job: tuple[str, int, str, bool]) -> Report:
    module, index, arch, everything = job
    variant = variants(module)[index]
    compiled = compile_variant(variant, TARGETS[arch])
    if arch.startswith("gfx"):
        return amd_report(compiled.asm["amdgcn"])
    return cuda_report(compiled.asm["cubin"], disassemble=everything or is_aligned(variant))


def measure(names: list[str], archs: list[str], jobs: int, *, everything: bool) -> dict[str, dict[str, Report]]:
    """Variant name -> arch -> report. `everything` also reads the loads of variants that promise nothing."""
    work = [(m, i, arch, everything) for m in names for i in range(len(variants(m))) for arch in archs]
    context = multiprocessing.get_context("spawn")  # Triton's and PyTorch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        reports = list(pool.map(report, work, chunksize=4))
    found: dict[str, dict[str, Report]] = {}
    for (m, i, arch, _), r in zip(work, reports, strict=True):
        found.setdefault(variants(m)[i].name, {})[arch] = r
    return found


def table(reports: dict[str, dict[str, Report]]) -> str:
    """Markdown: registers (and what spills) and loop per arch; the rest on sm_90, or the only arch there is."""
    archs = list(next(iter(reports.values()), {}))
    shown = "sm_90" if "sm_90" in archs else archs[0]
    lines = ["| " + " | ".join(["variant", *archs, "shared bytes", f"loads of {WIDTHS} bits"]) + " |"]
    lines.append("|---" * (len(archs) + 3) + "|")
    for name, row in reports.items():
        registers = [
            f"{r.registers}" + (f" +{r.spills} spilled" if r.spills else "") + (f" / {r.loop}" if r.loop else "")
            for r in row.values()
        ]
        loads = "/".join(str(row[shown].loads.get(str(bits), 0)) for bits in WIDTHS)
        lines.append("| " + " | ".join([name, *registers, str(row[shown].shared_bytes), loads]) + " |")
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
    """From the records that are there."""
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
        f"without a second number has no loop). On sm_90: shared memory, and the number of global loads of {widths}",
        "bits.",
        "",
        table({name: {arch: Report(*r) for arch, r in row.items()} for name, row in shown["variants"].items()}),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="files of kernels/, without .py (default: all that have variants)")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="keep the table in bench/results/static/")
    parser.add_argument("--page", action="store_true", help="make only the page there anew, compile nothing")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.page:
        write_page()
        return 0
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled; unset it")
    names = options.modules or modules()
    if options.write and (options.modules or options.arch != list(TARGETS)):
        parser.error("--write keeps the whole table: give neither modules nor --arch")
    repeated = [n for n, c in collections.Counter(v.name for m in names for v in variants(m)).items() if c > 1]
    if repeated:
        parser.error(f"variants share a name, so one would hide the other: {repeated[:3]}")
    reports = measure(names, options.arch, options.jobs, everything=options.write or not options.quiet)
    failures = [
        f"{variant.name}, {arch}: {problem}"
        for variant in (v for m in names for v in variants(m))
        for arch, r in reports[variant.name].items()
        for problem in problems(variant, arch, r)
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
