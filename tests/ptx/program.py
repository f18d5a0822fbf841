"""Parsing of PTX: the text that Triton emits becomes a list of instructions with their source lines.

Only the part of PTX that Triton's kernels use is known: one entry function, virtual registers, no calls. What the
parser does not support raises UnknownPTX with the text in question.
"""

import re
from typing import NamedTuple


class UnknownPTX(Exception):
    """PTX that this interpreter does not implement; the message names it."""


class Instruction(NamedTuple):
    """One instruction. Operands are texts: "%r1", "{%r1, %r2}", "[%rd1+16]", "0f3F800000", "$L__BB0_1"."""

    opcode: str  # with its modifiers: "ld.global.v4.b32"
    operands: tuple[str, ...]
    predicate: str | None  # register
    negated: bool  # runs where the predicate is false
    text: str
    source: str  # "kernel.py:173:20 @[ kernel.py:320:9 ]", or ""


class Block(NamedTuple):
    """Instructions that run one after the other; only the last one may branch."""

    label: str
    instructions: list[Instruction]


class Program(NamedTuple):
    """A kernel."""

    name: str
    parameters: list[tuple[str, str]]  # type ("u64", "f32") and name
    threads: int  # of a block
    blocks: list[Block]


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas that are not inside braces or brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return tuple(part.strip() for part in parts if part.strip())


_ENTRY = re.compile(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.global\s+\.align\s+\d+)?\s+(\w+)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_DIRECTIVES = (".reg", ".file", ".section", ".shared", ".extern", ".pragma", ".b8", ".b32", ".b64")
_BRANCHES = ("bra", "ret", "exit")


def parse(ptx: str) -> Program:
    """Parse a module with one kernel.

    >>> program = parse('''.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0) .reqntid 32 {
    ...     mov.u32 %r1, %tid.x;
    ...     ret;
    ... }''')
    >>> program.name, program.threads, program.blocks[0].instructions[0].operands
    ('k', 32, ('%r1', '%tid.x'))
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise UnknownPTX("the text has no .entry function")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise UnknownPTX(f"{entry[1]} has no .reqntid, so the number of its threads is not known")
    blocks, source = [Block("", [])], ""
    for line in ptx[entry.end() :].splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.strip()
        elif code.startswith("}"):
            break
        elif label := re.fullmatch(r"(\$\w+):", code):
            blocks.append(Block(label[1], []))
        elif code.startswith("{") and code != "{":
            raise UnknownPTX(f"cannot parse {code!r}: a scope with instructions in one line")
        elif code.startswith(_DIRECTIVES) and code.rstrip(";").count(";"):
            raise UnknownPTX(f"cannot parse {code!r}: a directive and instructions in one line")
        elif code and not code.startswith((*_DIRECTIVES, "{")):
            for text in filter(None, (piece.strip() for piece in code.split(";"))):
                found = _INSTRUCTION.fullmatch(text)
                if found is None:
                    raise UnknownPTX(f"cannot parse {text!r}")
                negated, predicate, opcode, operands = found.groups()
                instruction = Instruction(opcode, split_operands(operands), predicate, negated == "!", text, source)
                blocks[-1].instructions.append(instruction)
                if opcode.split(".")[0] in _BRANCHES:
                    blocks.append(Block("", []))
    return Program(entry[1], _PARAMETER.findall(entry[2]), int(threads[1]), [b for b in blocks if b.label or b[1]])
