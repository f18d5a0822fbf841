"""The innermost loops of a disassembled kernel: instructions, special-function instructions, loads and stores of each.

Of NVIDIA's SASS every instruction takes an issue slot. Of AMD's assembly the vector and memory instructions and the
barriers are counted; other scalar ones (s_*) are issued beside them.
"""

import collections
import re
from typing import NamedTuple

SASS_BYTES = 16  # of one instruction


class Loop(NamedTuple):
    """Counts of one pass through a loop, or of a whole program."""

    instructions: int = 0
    mufu: int = 0  # ex2, lg2, rcp, rsq, sqrt, tanh, sin, cos
    loads: int = 0  # of global memory
    stores: int = 0
    barriers: int = 0


_SASS = {"mufu": r"\bMUFU\b", "loads": r"\bLDG", "stores": r"\bSTG", "barriers": r"\bBAR\."}
_AMD = {
    "mufu": r"\tv_(?:exp|log|rcp|rsq|sqrt|sin|cos)_",
    "loads": r"\t(?:global|buffer|flat)_load",
    "stores": r"\t(?:global|buffer|flat)_store",
    "barriers": r"\ts_barrier",
}


def _counted(instructions: list[str], patterns: dict[str, str]) -> Loop:
    found = {name: sum(bool(re.search(p, x)) for x in instructions) for name, p in patterns.items()}
    return Loop(instructions=len(instructions), **found)


def cuda_loops(sass: str) -> tuple[Loop, list[Loop]]:
    """The whole program, and its innermost loops in order.

    A loop ends with a branch to an earlier address; an innermost one contains no other. A branch from behind the end
    of the code (a rare case, placed out of line) back into it is not a loop: it jumps over an EXIT.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    branch = r"BRA\S*\s+(?:!?UP\d+,\s*)?0x([0-9a-f]+)"
    jumps = {(int(target[1], 16), at) for at, text in code if (target := re.search(branch, text))}
    exits = [at for at, text in code if re.search(r"\bEXIT\b", text)]
    loops = [(a, b) for a, b in jumps if a < b and not any(a < at < b for at in exits)]
    inner = sorted(a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops))
    bodies = [[text for at, text in code if first <= at <= last] for first, last in inner]
    whole = [text for _, text in code if not text.startswith(("NOP", "BRA"))]  # padding and the jump to itself
    return _counted(whole, _SASS), [_counted(body, _SASS) for body in bodies]


def amd_loops(assembly: str) -> tuple[Loop, list[Loop]]:
    """The same, by LLVM's comments: which block is the header of an innermost loop, and which blocks belong to it."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    whole: list[str] = []
    inner, label, loop = [], "", ""
    for line in assembly.splitlines():
        if block := re.match(r"\.L(BB\d+_\d+):|; %bb", line):
            label, loop = block[1] or "", ""
        if member := re.search(r"in Loop: Header=(BB\d+_\d+)", line):
            loop = member[1]
        elif "Inner Loop Header" in line:
            loop = label
            inner.append(label)
        elif re.match(r"\t(?:(?:v|ds|global|buffer|flat)_|s_barrier)", line):
            whole.append(line)
            if loop:
                bodies[loop].append(line)
    return _counted(whole, _AMD), [_counted(bodies[header], _AMD) for header in inner]
