"""Proof that the detectors work on the real kernels: each fault is put into compiled code and must be detected.

    python tests/ptx/mutations.py [--write]

Runs every operation once, then once for each barrier that is removed, each predicate of an access to global memory that
is dropped, each tensor whose memory is one element too short, and with every program given the row of program 0. A
fault is detected if the interpreter reports an issue, and harmless if the results keep their bits without one: a
predicate may hold in all threads of the chosen shape. --write keeps the table in bench/results/compiled/.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
from ptx.emulator import Emulator, poisoned_allocations  # noqa: E402
from ptx.record import RESULTS, markdown_table, provenance  # noqa: E402

from ppo_fast import doctor  # noqa: E402

_GLOBAL_ACCESS = re.compile(r"@!?%p\d+ (?=(?:ld|st)\.global)")
_BARRIER = re.compile(r"bar\.sync[^;]*;")
_PROGRAM = re.compile(r"mov\.u32\s+(%r\d+), %ctaid\.x;")


class Fault(NamedTuple):
    kind: str  # "barrier", "mask", "element" or "program"
    number: int  # which of its kind
    kernel: str  # name of the kernel that has it
    rewrite: Callable[[str], str] | None  # of the kernel's PTX
    short: str | None = None  # name of the tensor that is one element too short


class Outcome(NamedTuple):
    operation: str
    fault: Fault
    result: str  # "detected", "harmless" or "wrong results"
    issue: str


def without(pattern: re.Pattern[str], number: int) -> Callable[[str], str]:
    """Remove one match."""

    def rewrite(ptx: str) -> str:
        match = list(pattern.finditer(ptx))[number]
        return ptx[: match.start()] + ptx[match.end() :]

    return rewrite


def same_row(ptx: str) -> str:
    return _PROGRAM.sub(r"mov.u32 \1, 0;", ptx)


def faults_of(kernel: str, ptx: str, tensors: list[str], programs: int) -> Iterator[Fault]:
    for kind, pattern in (("barrier", _BARRIER), ("mask", _GLOBAL_ACCESS)):
        for number in range(len(pattern.findall(ptx))):
            yield Fault(kind, number, kernel, without(pattern, number))
    for number, name in enumerate(tensors):
        yield Fault("element", number, kernel, None, name)
    if programs > 1:
        yield Fault("program", 0, kernel, same_row)


class Observer(Emulator):
    """An emulator that puts one fault into one kernel, and keeps the PTX of all."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Fault | None = None
        self.seen: dict[str, tuple[str, list[str], int]] = {}

    def execute(self, compiled, arguments, launch, grid):  # type: ignore[no-untyped-def]
        name = launch.kernel.__name__
        tensors = [n for (n, _), x in zip(launch.types, arguments, strict=True) if isinstance(x, torch.Tensor)]
        self.seen.setdefault(name, (compiled.asm["ptx"], tensors, grid[0]))
        hit = self.fault is not None and self.fault.kernel == name and compiled.asm["ptx"] == self.seen[name][0]
        self.rewrite = self.fault.rewrite if hit and self.fault.rewrite else (lambda ptx: ptx)
        self.short = self.fault.short if hit else None
        super().execute(compiled, arguments, launch, grid)


def run(observer: Observer, operation: str, inputs: doctor.Inputs) -> list[torch.Tensor]:
    observer.issues.clear()
    with observer.installed(), poisoned_allocations():
        return doctor.results(operation, doctor.ppo, inputs, torch.float32, backend="triton")


def inputs_of(operation: str) -> doctor.Inputs:
    """The doctor's inputs; fewer rows where each of them has a vocabulary, as each fault needs a run."""
    inputs = doctor.make_inputs(torch.device("cpu"))
    if "logprobs" not in operation and "linear" not in operation:
        return inputs
    shape = inputs["mask"].shape
    return {name: x[:2, :7].contiguous() if x.shape[:2] == shape else x for name, x in inputs.items()}


def outcomes(
    operation: str,
    kinds: tuple[str, ...] = ("barrier", "mask", "element", "program"),
    inputs: doctor.Inputs | None = None,
) -> Iterator[Outcome]:
    """Every fault of every kernel that an operation launches."""
    observer = Observer()
    inputs = inputs_of(operation) if inputs is None else inputs
    right = run(observer, operation, inputs)
    assert not observer.issues, list(observer.issues)
    for kernel, (ptx, tensors, programs) in dict(observer.seen).items():
        for fault in faults_of(kernel, ptx, tensors, programs):
            if fault.kind not in kinds:
                continue
            observer.fault = fault
            found = run(observer, operation, inputs)
            same = all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
            issue = next(iter(observer.issues), None)
            result = "detected" if issue else "harmless" if same else "wrong results"
            yield Outcome(operation, fault, result, "" if issue is None else issue.message)
    observer.fault = None


PAGE = """# Faults put into compiled kernels

Made by `python tests/ptx/mutations.py --write`. {provenance}.

Detected: the interpreter reports an issue. Wrong results: it reports none, as every access is in order, but the numbers
change, which the accuracy tests detect. Harmless: no issue, and all results keep their bits, because the fault changes
nothing at the shape of the test. Removed: a barrier; the predicate of a load or store of global memory; the last
element of a tensor; the number of the program, so that all take the first rows.

{table}
"""


def table(found: list[Outcome]) -> str:
    results = ("detected", "harmless", "wrong results")
    counts = Counter((o.operation, o.fault.kernel, o.fault.kind, o.result) for o in found)
    groups = dict.fromkeys((o.operation, o.fault.kernel, o.fault.kind) for o in found)
    rows = [[*group, *(str(counts[*group, result]) for result in results)] for group in groups]
    return markdown_table(["operation", "kernel", "removed", "detected", "harmless", "wrong results"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table")
    options = parser.parse_args()
    source = provenance()  # of the code that is loaded now, not of the commit at the end
    found: list[Outcome] = []
    for operation in doctor.CHECKS:
        found += outcomes(operation)
        print(f"{operation}: {len(found)} faults so far", flush=True)
    print(table(found))
    for operation, fault, result, _ in found:
        if result == "wrong results":
            print(f"wrong results without an issue: {operation}, {fault.kernel}, {fault.kind} {fault.number}")
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = PAGE.format(provenance=source, table=table(found))
        (RESULTS / "detectors.md").write_text(text, encoding="utf-8")
    return 1 if any(o.result == "wrong results" and o.fault.kind != "mask" for o in found) else 0


if __name__ == "__main__":
    sys.exit(main())
