"""Translation of a PTX program to one Python function that computes all threads of a block with NumPy.

A register becomes a local variable that holds an array with one element for each thread, or a NumPy scalar where the
value is the same in all threads. A 32-bit register %r7 has up to three names: `r7` for its bits, `r7s` for the same
bits as a signed integer and `r7f` as a number; only the names that some instruction reads are made. Blocks of
instructions follow each other as `if block == 3:`, and a branch sets `block`. A register that no instruction has
written has no value, so reading it raises NameError, which machine.py reports.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from ptx import arithmetic
from ptx.instructions import RULES
from ptx.program import Instruction, Program, UnknownPTX

POISON = 0x7FBA7FBA  # what memory and registers hold before they are written; a NaN in fp32, fp16 and bf16
_WIDTHS = {"p": 1, "rs": 16, "r": 32, "rd": 64, "f": 32, "fd": 64, "h": 16, "hh": 32}
_DTYPES = {"b": "U", "u": "U", "s": "I", "f": "F"}
_SPECIAL = {f"%{name}.{axis}": f"{name}_{axis}" for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"}
_SPECIAL["%laneid"] = "laneid"
_REDUCTIONS = {  # redux.sync of a warp -> function of two operands
    "redux.sync.max.s32": "np.maximum",
    "redux.sync.min.s32": "np.minimum",
    "redux.sync.add.s32": "np.add",
    "redux.sync.max.f32": "np.fmax",
}


class Translation(NamedTuple):
    """The Python function of a program."""

    code: Any  # defines `kernel(machine, approximate, parameters)`
    instructions: list[Instruction]
    line_of: list[int]  # line of the Python text -> index into `instructions`
    contractions: int  # pairs of mul and add that the assembler of a GPU may fuse


def _kind_width(kind: str) -> int:
    return 1 if kind == "pred" else 64 if kind == "f32x2" else int(re.sub(r"\D", "", kind))


def _suffix(kind: str) -> str:
    return kind[0] if kind[0] in "sf" and kind not in ("f32x2",) else ""


def _dtype(kind: str) -> str:
    """Name of the NumPy dtype: "U32", "I64", "F16", or "bool"."""
    if kind == "pred":
        return "bool"
    return ("U64") if kind == "f32x2" else _DTYPES[kind[0]] + str(_kind_width(kind))


class Translator:
    """Writes the Python text of a program."""

    def __init__(self, program: Program, *, contract: bool) -> None:
        self.program = program
        self.contract = contract
        self.wanted: dict[str, set[str]] = {}  # register -> suffixes of the names that are read
        self.constants: dict[str, str] = {}  # name -> expression
        self.defined: set[str] = set()  # registers that an instruction without a predicate writes first
        self.initial: set[str] = set()  # the others: some threads may read unwritten memory
        self.lines: list[str] = []
        self.line_of: list[int] = []
        self.instructions = [i for block in program.blocks for i in block.instructions]
        writers = [i for i in self.instructions if i.operands and not i.opcode.startswith(("st", "bar"))]
        self.written = {register for i in writers for register in re.findall(r"%\w+", i.operands[0])}
        self.index = 0
        self.contractions = 0
        # Register -> sources of the mul that may be fused, as expressions and as operands.
        self.products: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {}

    # Text

    def emit(self, line: str) -> None:
        self.lines.append(line)
        self.line_of.append(self.index)

    def constant(self, value: str) -> str:
        """A number that is made once, before the first instruction."""
        name = "c" + re.sub(r"\W", "_", value).strip("_")
        self.constants[name] = value
        return name

    # Operands

    def name(self, register: str, kind: str) -> str:
        found = re.fullmatch(r"%([a-z]+)(\d+)", register)
        if found is None or found[1] not in _WIDTHS:
            raise UnknownPTX(f"unknown register {register!r}")
        return found[1] + found[2] + _suffix(kind)

    def width(self, register: str) -> int:
        return _WIDTHS[re.sub(r"\W|\d", "", register)]

    def immediate(self, text: str, kind: str) -> str:
        width = _kind_width(kind)
        if kind == "pred":
            return self.constant(f"np.bool_({int(text, 0)})")
        if text.startswith(("0f", "0d")):
            bits = int(text[2:], 16)
        elif text.startswith("global_smem"):
            bits = int(text.partition("+")[2] or "0", 0)
        else:
            bits = int(text.removesuffix("U"), 0) & ((1 << width) - 1)
        value = f"U{width}({bits})"
        return self.constant(value if _dtype(kind) == f"U{width}" else f"{value}.view({_dtype(kind)})")

    def read(self, text: str, kind: str) -> str:
        """An expression for an operand."""
        if text in _SPECIAL:
            return _SPECIAL[text]
        if not text.startswith("%"):
            return self.immediate(text, kind)
        width, wanted = self.width(text), _kind_width(kind)
        if wanted == width:
            self.wanted.setdefault(text, set()).add(_suffix(kind))
            return self.name(text, kind)
        if wanted > width:
            raise UnknownPTX(f"{text} is read as {kind}")
        self.wanted.setdefault(text, set()).add("")
        narrow = f"{self.name(text, 'b')}.astype(U{wanted})"
        return narrow if _dtype(kind) == f"U{wanted}" else f"{narrow}.view({_dtype(kind)})"

    def write(self, register: str, kind: str, expression: str, mask: str | None) -> None:
        """An assignment, in the threads of the mask only, and the other names of the register."""
        if register == "_":
            return
        width = self.width(register)
        if _kind_width(kind) < width:  # a byte in a 16-bit register
            wide = "I" if kind[0] == "s" else "U"
            kind, expression = f"{wide.lower().replace('i', 's')}{width}", f"({expression}).astype({wide}{width})"
        own = self.name(register, kind)
        self.products = {  # a sum after this write is no longer one of these products
            product: found
            for product, found in self.products.items()
            if register != product and register not in found[1]
        }
        if mask is None:
            if register not in self.initial:
                self.defined.add(register)
            self.emit(f"{own} = {expression}")
        else:
            if register not in self.defined:
                self.initial.add(register)
            self.wanted.setdefault(register, set()).add(_suffix(kind))
            self.emit(f"{own} = np.where({mask}, {expression}, {own})")
        self.other_names(register, own, _suffix(kind))

    def other_names(self, register: str, own: str, suffix: str) -> None:
        width = self.width(register)
        for other in sorted(self.wanted.get(register, set()) - {suffix}):
            dtype = {"": "U", "s": "I", "f": "F"}[other] + str(width)
            self.emit(f"{self.name(register, 'b') + other} = {own}.view({dtype})")

    def registers(self, text: str) -> list[str]:
        """The registers of "{%r1, %r2}", or of "%r1"."""
        return [part.strip() for part in text.strip("{} ").split(",")]

    def address(self, text: str) -> str:
        base, _, offset = text.strip("[] ").partition("+")
        base = base.strip()
        if base.startswith("global_smem"):
            return self.constant(f"U64({int(offset or '0', 0)})")
        address = self.read(base, f"u{self.width(base)}")
        if self.width(base) == 32:
            address = f"{address}.astype(U64)"
        distance = int(offset or "0", 0)
        if not distance:
            return address
        return f"{address} + " + self.constant(f"U64({distance % 2**64})")

    # Instructions

    def mask(self, instruction: Instruction) -> str | None:
        if instruction.predicate is None:
            return None
        register = self.read(instruction.predicate, "pred")
        return f"~{register}" if instruction.negated else register

    def instruction(self, instruction: Instruction, targets: dict[str, int], following: int) -> None:
        opcode, operands, mask = instruction.opcode, instruction.operands, self.mask(instruction)
        kind = opcode.split(".")[0]
        if opcode in RULES and not operands[0].startswith("{") and not operands[-1].startswith("{"):
            self.compute(instruction, mask)
        elif kind == "mov":
            self.move_halves(operands, opcode, mask)
        elif kind in ("ld", "st"):
            self.memory(instruction, mask)
        elif kind in ("ldmatrix", "stmatrix"):
            self.matrix(instruction)
        elif kind == "bra":
            target = targets[operands[0]]
            jump = f"block = {target}; continue"
            counted = mask is not None or target < following  # every branch back, so that an endless loop ends
            self.emit(f"if machine.branches({mask or True}, {self.index}): {jump}" if counted else jump)
        elif kind in ("ret", "exit"):
            self.emit("return" if mask is None else f"if machine.branches({mask}, {self.index}): return")
        elif opcode in ("bar.sync", "barrier.sync"):
            if operands not in (("0",), ("0", str(self.program.threads))):
                raise UnknownPTX(f"a barrier of a part of the threads in {instruction.text!r}")
            self.emit(f"machine.barrier({mask}, {self.index})")
        elif opcode == "bar.warp.sync":
            pass  # the lanes of a warp are in lockstep
        elif kind == "shfl":
            self.shuffle(instruction)
        elif opcode in _REDUCTIONS:
            self.whole_warps(instruction)
            number = opcode.rsplit(".", 1)[1]
            arguments = f"{_REDUCTIONS[opcode]}, {self.read(operands[1], number)}"
            self.write(operands[0], number, f"machine.reduce_warps({arguments})", None)
        else:
            raise UnknownPTX(f"unknown instruction {opcode!r} in {instruction.text!r}")

    def compute(self, instruction: Instruction, mask: str | None) -> None:
        result, *sources = instruction.operands
        rule = RULES.get(f"{instruction.opcode} of {len(sources)}", RULES[instruction.opcode])
        if len(sources) != len(rule.sources):
            raise UnknownPTX(f"{len(sources)} sources in {instruction.text!r}")
        values = [self.read(text, kind) for text, kind in zip(sources, rule.sources, strict=True)]
        expression = rule.expression.format(*values)
        opcode = instruction.opcode
        if opcode in ("add.f32", "sub.f32") and (fused := self.fused(opcode, sources, values)):
            self.contractions += 1
            expression = fused if self.contract else expression
        self.write(result, rule.result, expression, mask)
        if opcode == "mul.f32" and mask is None and result not in sources:
            self.products[result] = (values[0], values[1]), tuple(sources)

    def fused(self, opcode: str, sources: list[str], values: list[str]) -> str | None:
        """a b + c, where one operand of an addition without a rounding modifier is such a product."""
        for product, other in ((0, 1), (1, 0)):
            if sources[product] in self.products:
                (a, b), _ = self.products[sources[product]]
                c = values[other]
                if opcode == "sub.f32":
                    a, c = (a, f"-{c}") if product == 0 else (f"-{a}", c)
                return f"fma({a}, {b}, {c})"
        return None

    def move_halves(self, operands: tuple[str, ...], opcode: str, mask: str | None) -> None:
        """mov between a register and the registers of its parts."""
        width = int(re.sub(r"\D", "", opcode))
        into, source = operands
        if into.startswith("{"):
            parts = self.registers(into)
            size = width // len(parts)
            whole = self.read(source, f"b{width}")
            for i, part in enumerate(parts):
                self.write(part, f"b{size}", f"({whole} >> U{width}({size * i})).astype(U{size})", mask)
        else:
            parts = self.registers(source)
            size = width // len(parts)
            # On sm_100 a single number is added in a pair whose other half is left undefined, and is not used.
            self.initial |= {part for part in parts if part.startswith("%") and part not in self.written}
            shifted = (
                f"({self.read(part, f'b{size}')}.astype(U{width}) << U{width}({size * i}))"
                for i, part in enumerate(parts)
            )
            self.write(into, f"b{width}", " | ".join(shifted), mask)

    def memory(self, instruction: Instruction, mask: str | None) -> None:
        """ld and st of .param, .global and .shared, with .v2 and .v4."""
        operation, space, *modifiers, kind = instruction.opcode.split(".")
        count = int(modifiers[0][1:]) if modifiers else 1
        if space not in ("param", "global", "shared") or modifiers[1:] or (modifiers and modifiers[0][0] != "v"):
            raise UnknownPTX(f"unknown instruction {instruction.opcode!r} in {instruction.text!r}")
        address, registers = instruction.operands if operation == "st" else instruction.operands[::-1]
        width = _kind_width(kind)
        parts = self.registers(registers)
        if space == "param":
            self.write(parts[0], f"b{width}", f"parameters[{address.strip('[] ')!r}].astype(U{width})", mask)
            return
        where = f"{self.address(address)}, {width // 8}, {count}, {mask}, {self.index}"
        if operation == "ld":
            self.emit(f"loaded = machine.{space}_memory.load({where})")
            for i, part in enumerate(parts):
                self.write(part, kind, f"loaded[{i}]" + (f".view({_dtype(kind)})" if kind[0] in "sf" else ""), mask)
        else:
            values = ", ".join(self.read(part, f"b{width}") for part in parts)
            self.emit(f"machine.{space}_memory.store({where}, ({values},))")

    def matrix(self, instruction: Instruction) -> None:
        """ldmatrix and stmatrix of 8 x 8 matrices of 16 bits, not transposed."""
        found = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x(\d)\.shared\.b16", instruction.opcode)
        if found is None:
            raise UnknownPTX(f"unknown instruction {instruction.opcode!r} in {instruction.text!r}")
        if instruction.predicate is not None:
            raise UnknownPTX(f"a predicate of {instruction.text!r}")
        address, registers = instruction.operands if found[1] == "st" else instruction.operands[::-1]
        self.emit(f"rows = {self.address(address)}")
        for i, register in enumerate(self.registers(registers)):
            where = f"machine.matrix_address(rows, {i}, {self.index}), 4, 1, None, {self.index}"
            if found[1] == "ld":
                self.write(register, "b32", f"machine.shared_memory.load({where})[0]", None)
            else:
                self.emit(f"machine.shared_memory.store({where}, ({self.read(register, 'b32')},))")

    def whole_warps(self, instruction: Instruction) -> None:
        """The last operand, which lanes take part, must be all of them."""
        if instruction.predicate is not None:
            raise UnknownPTX(f"a predicate of {instruction.text!r}")
        self.emit(f"machine.whole_warps({self.read(instruction.operands[-1], 'b32')}, {self.index})")

    def shuffle(self, instruction: Instruction) -> None:
        mode = instruction.opcode.split(".")[2]
        result, value, distance, clamp, _ = instruction.operands
        if "|" in result or not instruction.opcode.endswith(".b32"):
            raise UnknownPTX(f"unknown form of shfl in {instruction.text!r}")
        self.whole_warps(instruction)
        arguments = ", ".join(self.read(text, "b32") for text in (value, distance, clamp))
        self.write(result, "b32", f"machine.shuffle({mode!r}, {arguments})", None)

    # The whole program

    def body(self) -> None:
        targets = {block.label: i for i, block in enumerate(self.program.blocks) if block.label}
        self.index = self.contractions = 0
        for i, block in enumerate(self.program.blocks):
            self.products = {}
            self.emit(f"if block == {i}:")
            first = len(self.lines)
            for instruction in block.instructions:
                self.instruction(instruction, targets, i + 1)
                self.index += 1
            self.emit(f"block = {i + 1}")
            self.lines[first:] = [f" {line}" for line in self.lines[first:]]

    def translate(self) -> Translation:
        self.body()  # finds which names are read
        self.lines, self.line_of = [], []
        self.body()
        if self.instructions and self.instructions[-1].opcode not in ("ret", "exit", "bra", "bra.uni"):
            raise UnknownPTX(f"{self.program.name} does not end with ret")
        head = ["def kernel(machine, approximate, parameters):"]
        special = sorted(set(_SPECIAL.values()))
        head += [f" {name} = machine.special[{name!r}]" for name in special]
        head += [f" {name} = {value}" for name, value in self.constants.items()]
        for register in sorted(self.initial):
            width = self.width(register)
            unwritten = "np.bool_(False)" if width == 1 else f"U{width}({(POISON << 32 | POISON) % 2**width})"
            for suffix in sorted(self.wanted.get(register, set()) | {""}):
                view = f".view({ {'': 'U', 's': 'I', 'f': 'F'}[suffix] }{width})" if suffix else ""
                head.append(f" {self.name(register, 'b') + suffix} = {unwritten}{view}")
        head += [" block = 0", " while True:"]
        text = "\n".join([*head, *(f"  {line}" for line in self.lines)])
        code = compile(text, f"<{self.program.name}>", "exec")
        line_of = [0] * (len(head) + 1) + self.line_of
        return Translation(code, self.instructions, line_of, self.contractions)


NAMESPACE = {name: getattr(arithmetic, name) for name in dir(arithmetic) if not name.startswith("_")}
NAMESPACE |= {"np": np, "np_add": np.add, "np_sub": np.subtract, "np_mul": np.multiply}
NAMESPACE |= {f"U{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)}
NAMESPACE |= {f"I{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)}


def translate(program: Program, *, contract: bool = False) -> Translation:
    """contract: fuse each product and sum that may be fused, as the assembler of a GPU is free to do."""
    return Translator(program, contract=contract).translate()
