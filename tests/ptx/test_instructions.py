"""Every instruction of the PTX interpreter, with a few lines of PTX and results from Python's own numbers."""

import itertools
import math
import operator
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx.arithmetic import Approximations
from ptx.instructions import RULES
from ptx.machine import Kernel, Machine
from ptx.memory import Segment
from ptx.program import UnknownPTX

THREADS = 32
REGISTERS = {1: "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def width_of(kind: str) -> int:
    return 1 if kind == "pred" else 64 if kind == "f32x2" else int(re.sub(r"\D", "", kind))


def execute(body: str, inputs: list[np.ndarray], result_bytes: int, *, amplitude: float = 0.0, shared: int = 256):
    """Run lines of PTX in 32 threads. Input i is at [%rd90 + i], the result at %rd99; both are this thread's."""
    head = ["mov.u32 %r90, %tid.x;"]
    for i, data in enumerate(inputs):
        head += [f"ld.param.b64 %rd{80 + i}, [k_param_{i}];"]
        head += [f"mad.wide.u32 %rd{90 + i}, %r90, {data.itemsize}, %rd{80 + i};"]
    head += [f"ld.param.b64 %rd89, [k_param_{len(inputs)}];", f"mad.wide.u32 %rd99, %r90, {result_bytes}, %rd89;"]
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(len(inputs) + 1))
    text = "\n".join([f".visible .entry k({parameters}) .reqntid {THREADS} {{", *head, body, "ret;", "}"])
    out = np.zeros(THREADS * result_bytes, np.uint8)
    segments, values = [], {}
    for i, data in enumerate([*(np.ascontiguousarray(x).view(np.uint8) for x in inputs), out]):
        segments.append(Segment(4096 * (i + 1), data, f"input {i}"))
        values[f"k_param_{i}"] = np.uint64(4096 * (i + 1))
    machine = Machine(Kernel(text), segments, shared)
    machine.run(values, (1, 1, 1), Approximations(amplitude=amplitude), seed=0)
    assert not machine.issues, next(iter(machine.issues))
    return out


def bits_array(values: list[int], width: int) -> np.ndarray:
    """The values, repeated for 32 threads, as unsigned integers."""
    size = max(width, 8)
    filled = list(itertools.islice(itertools.cycle(values), THREADS))
    return np.array([x % 2**size for x in filled], dtype=f"uint{size}")


def compute(opcode: str, result: str, sources: tuple[str, ...], columns: list[tuple[int, ...]], **options: Any):
    """Bits of the result of an instruction for each tuple of operand bits."""
    assert len(columns) <= THREADS
    lines, names, inputs = [], [], []
    for i, kind in enumerate(sources):
        width = width_of(kind)
        inputs.append(bits_array([column[i] for column in columns], width))
        register = f"{REGISTERS[width]}{i + 1}"
        if kind == "pred":
            lines += [f"ld.global.b8 %rs{i + 40}, [%rd{90 + i}];", f"setp.ne.b16 {register}, %rs{i + 40}, 0;"]
        else:
            lines.append(f"ld.global.b{width} {register}, [%rd{90 + i}];")
        names.append(register)
    width = width_of(result)
    target = f"{REGISTERS[width]}70"
    lines.append(f"{opcode} {target}, {', '.join(names)};")
    if result == "pred":
        lines += ["selp.b32 %r71, 1, 0, %p70;", "st.global.b32 [%rd99], %r71;"]
        width = 32
    else:
        lines.append(f"st.global.b{width} [%rd99], {target};")
    out = execute("\n".join(lines), inputs, width // 8, **options)
    return out.view(f"uint{width}").tolist()[: len(columns)]


TESTED: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def every_rule_is_tested():
    """After the last test of this file no rule may be left, unless only some of them run in this process."""
    yield
    if len(TESTED) > 0.9 * len(RULES):
        assert set(RULES) - TESTED == set()


def check(opcode: str, columns: list[tuple[int, ...]], expected: Callable[..., int | None]) -> None:
    """expected(operand bits ...) gives the bits of the result, or None where PTX leaves it open."""
    rule = RULES[opcode]
    TESTED.add(opcode)
    for start in range(0, len(columns), THREADS):
        part = columns[start : start + THREADS]
        for column, actual in zip(part, compute(opcode.split()[0], rule.result, rule.sources, part), strict=True):
            wanted = expected(*column)
            if wanted is not None:
                size = 32 if rule.result == "pred" else width_of(rule.result)
                assert actual == wanted % 2**size, f"{opcode} {[hex(x) for x in column]}: {actual:#x}, not {wanted:#x}"


def signed(x: int, width: int) -> int:
    return x - 2**width if x >= 2 ** (width - 1) else x


def integers(width: int) -> list[int]:
    """Numbers at which integer arithmetic goes wrong."""
    return [0, 1, 2, 7, 2 ** (width - 1) - 1, 2 ** (width - 1), 2**width - 1, 2**width - 3, 0x5A3C96E1 % 2**width]


def truncated(a: int, b: int) -> int | None:
    return None if b == 0 else int(Fraction(a, b))


def shifted(x: int, amount: int, width: int) -> int:
    return x >> min(amount, width - 1) if x < 0 or amount < width else 0


INTEGER_MODELS: dict[str, Callable[[int, int], int | None]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda a, b: None if b == 0 else a - b * truncated(a, b),
}


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("sign", ["s", "u"])
@pytest.mark.parametrize("name", [*INTEGER_MODELS, "mul.wide"])
def test_integer_arithmetic_matches_pythons(name, sign, width):
    opcode, numbers = f"{name}.{sign}{width}", integers(width)
    if opcode not in RULES:
        assert (name, width) == ("mul.wide", 64)
        return
    model = INTEGER_MODELS.get(name, operator.mul)

    def expected(a: int, b: int) -> int | None:
        return model(*((signed(x, width) for x in (a, b)) if sign == "s" else (a, b)))

    # The quotient of the smallest number and -1 does not fit.
    overflow = (2 ** (width - 1), 2**width - 1) if sign == "s" and name in ("div", "rem") else None
    check(opcode, [pair for pair in itertools.product(numbers, numbers) if pair != overflow], expected)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_multiply_add_of_integers_matches_pythons(width):
    numbers = integers(width)
    triples = list(zip(numbers, reversed(numbers), [3, *numbers[1:]], strict=True))
    for sign in "su":
        check(f"mad.lo.{sign}{width}", triples, lambda a, b, c: a * b + c)
        if width < 64:
            value = (lambda x: signed(x, width)) if sign == "s" else (lambda x: x)
            wide = [(a, b, c * 2**width + 5) for a, b, c in triples]
            check(f"mad.wide.{sign}{width}", wide, lambda a, b, c, value=value: value(a) * value(b) + c)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bit_operations_match_pythons(width):
    pairs = list(itertools.product(integers(width), repeat=2))
    for name, model in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(f"{name}.b{width}", pairs, model)
    check(f"not.b{width}", [(x,) for x in integers(width)], lambda x: ~x)
    check(f"neg.s{width}", [(x,) for x in integers(width)], lambda x: -x)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_clamp_the_amount_to_the_width(width):
    pairs = list(itertools.product(integers(width), [0, 1, width - 1, width, 200]))
    check(f"shl.b{width}", pairs, lambda x, n: x << n if n < width else 0)
    check(f"shr.u{width}", pairs, lambda x, n: shifted(x, n, width))
    check(f"shr.s{width}", pairs, lambda x, n: shifted(signed(x, width), n, width))


def test_predicates_combine():
    pairs = list(itertools.product([0, 1], repeat=2))
    for name, model in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(f"{name}.pred", pairs, model)
    check("not.pred", [(0,), (1,)], lambda x: 1 - x)
    check("mov.pred", [(0,), (1,)], lambda x: x)


def test_bit_fields_and_permuted_bytes_are_those_of_the_manual():
    fields = {(0xABCD1234, 8, 8): 0x12, (0xABCD1234, 0, 32): 0xABCD1234, (0xABCD1234, 28, 8): 0xA, (5, 3, 0): 0}
    fields |= {(0xABCD1234, 256 + 8, 8): 0x12, (0xABCD1234, 8, 256 + 8): 0x12, (0xABCD1234, 40, 8): 0}
    check("bfe.u32", list(fields), lambda *key: fields[key])
    wide = {(0x1234ABCD << 32, 48, 16): 0x1234, (2**64 - 1, 60, 16): 15, (5, 0, 64): 5, (5, 64, 3): 0}
    check("bfe.u64", list(wide), lambda *key: wide[key])
    wide_signed = {(0x8000 << 32, 40, 8): -128, (0x8000 << 32, 40, 9): 128, (2**63, 60, 16): -8}
    check("bfe.s64", list(wide_signed), lambda *key: wide_signed[key])
    signed_fields = {(0b0110, 1, 2): -1, (0b0110, 1, 3): 3, (0xF0000000, 28, 1): -1, (7, 0, 0): 0}
    check("bfe.s32", list(signed_fields), lambda *key: signed_fields[key])
    # Selector 0x3340 of (0xA1, 0xB2): bytes 0, 4, 3, 3. A nibble from 8 on repeats the sign of its byte.
    bytes_ = {(0x44332211, 0x88776655, 0x7531): 0x88664422, (0x44332211, 0x88776655, 0x3210): 0x44332211}
    bytes_ |= {(0x80FF0122, 0, 0xBA98): 0xFFFF0000, (0xA1, 0xB2, 0x3340): 0x0000B2A1}
    check("prmt.b32", list(bytes_), lambda *key: bytes_[key])


COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le}
COMPARISONS |= {"gt": operator.gt, "ge": operator.ge}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_integers_respect_the_sign(name):
    for width, sign in itertools.product((16, 32, 64), "bsu"):
        number = (lambda x, w=width: signed(x, w)) if sign == "s" else (lambda x: x)
        pairs = list(itertools.product(integers(width), repeat=2))
        check(f"setp.{name}.{sign}{width}", pairs, lambda a, b, n=number: int(COMPARISONS[name](n(a), n(b))))


def f32(x: float) -> int:
    with np.errstate(all="ignore"):
        return int(np.float32(x).view(np.uint32))


def f16(x: float) -> int:
    return int(np.float16(x).view(np.uint16))


def bf16(x: float) -> int:
    """Of numbers that bf16 holds exactly."""
    return f32(x) >> 16


def number(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def brain(bits: int) -> float:
    return number(bits << 16)


NUMBERS = [0.0, -0.0, 1.0, -1.5, math.pi, 1e-3, 65504.0, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_numbers_are_false_for_nan_unless_they_are_unordered(name):
    for kind, pack, unpack in (("f32", f32, number), ("f16", f16, half), ("bf16", bf16, brain)):
        values = [pack(x) for x in (0.0, -0.0, 1.0, -2.0, math.inf, math.nan)]
        pairs = list(itertools.product(values, repeat=2))

        def compare(a: int, b: int, unordered: int, unpack=unpack) -> int:
            x, y = unpack(a), unpack(b)
            return unordered if math.isnan(x) or math.isnan(y) else int(COMPARISONS[name](x, y))

        check(f"setp.{name}.{kind}", pairs, lambda a, b, c=compare: c(a, b, 0))
        check(f"setp.{name}u.{kind}", pairs, lambda a, b, c=compare: c(a, b, 1))
        check(f"setp.nan.{kind}", pairs, lambda a, b, u=unpack: int(math.isnan(u(a)) or math.isnan(u(b))))
        check(f"setp.num.{kind}", pairs, lambda a, b, u=unpack: int(not (math.isnan(u(a)) or math.isnan(u(b)))))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s32", "u32", "f32", "f64"])
def test_a_selection_takes_the_first_where_the_predicate_holds(kind):
    check(f"selp.{kind}", [(11, 22, 1), (11, 22, 0)], lambda a, b, p: a if p else b)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_move_copies_bits(width):
    for sign in "bsu":
        check(f"mov.{sign}{width}", [(x,) for x in integers(width)], lambda x: x)
    check("mov.f32", [(f32(1.5),)], lambda x: x)


def exactly(value: Fraction | float) -> int:
    """Bits of the fp32 nearest to a number, ties to even, worked out with Fractions."""
    if isinstance(value, float):
        return f32(value)
    if value == 0:
        return 0
    exponent = max(-126, math.floor(math.log2(abs(value))) if abs(value) > Fraction(1, 2**140) else -126)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent and exponent > -126:
        exponent -= 1
    scaled = value / Fraction(2) ** (exponent - 23)
    # round() of a Fraction ties to even; a negative number may become -0.0
    return f32(math.copysign(float(round(scaled)) * 2.0 ** (exponent - 23), value))


def same_or_nan(model: Callable[..., float | Fraction]) -> Callable[..., int | None]:
    """NaN results have no fixed bits."""

    def expected(*bits: int) -> int | None:
        values = [number(x) for x in bits]
        if all(math.isfinite(x) for x in values):
            result = model(*(Fraction(x) for x in values))
            return None if result == 0 else exactly(result)  # the sign of zero is checked elsewhere
        with np.errstate(all="ignore"):
            result = float(model(*(np.float32(x) for x in values)))
        return None if math.isnan(result) else f32(result)

    return expected


FINITE = [1.0, -1.5, math.pi, 1e-3, 65504.0, 3e38, -3e38, 1e-40, 1.0000001, 16777215.0, -1e-30]
PAIRS = [(f32(a), f32(b)) for a, b in itertools.product([*FINITE, math.inf], repeat=2)]


@pytest.mark.parametrize("rounding", ["", ".rn"])
def test_sums_and_products_round_once(rounding):
    for name, model in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
        check(f"{name}{rounding}.f32", PAIRS, same_or_nan(model))


def test_a_fused_multiply_add_rounds_once():
    """Halfway cases of the product's tail, where rounding to fp64 first gives another number."""
    one, ulp = 1.0, 2.0**-23
    hard = [(one + ulp, one + ulp, 2.0**-70), (one + ulp, one - ulp / 2, -one), (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60)]
    hard += [
        (4097.0, 4097.0, 2.0**-40),
        (4097.0, 4095.0, -(2.0**-40)),
        (1e-20, 1e-20, 1e-45),
        (2.0**-75, 2.0**-74, 0.0),
    ]
    hard += [(math.pi, -math.e, 8.5), (3e38, 2.0, -3e38), (math.inf, 1.0, 1.0)]
    triples = [tuple(f32(x) for x in triple) for triple in hard]
    check("fma.rn.f32", triples, same_or_nan(lambda a, b, c: a * b + c))
    normal = [t for t, h in zip(triples, hard, strict=True) if min(map(abs, h)) > 1e-30 and math.isfinite(h[0])]
    check("fma.rn.ftz.f32", normal, same_or_nan(lambda a, b, c: a * b + c))


def test_rounding_an_fma_twice_would_fail_the_test_above():
    a, c = np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    twice = np.float32(float(a) * float(a) + float(c))
    assert exactly(Fraction(float(a)) ** 2 + Fraction(float(c))) != int(twice.view(np.uint32))


def test_flushing_turns_subnormal_operands_and_results_into_zeros():
    tiny = f32(1e-40)
    for name in ("add", "sub", "mul"):
        for rounding in ("", ".rn"):
            check(f"{name}{rounding}.ftz.f32", [(tiny, f32(1.0)), (f32(3.0), f32(2.0))],
                  lambda a, b, n=name: {"add": f32(1 if a == tiny else 5), "sub": f32(-1 if a == tiny else 1),
                                        "mul": f32(0 if a == tiny else 6)}[n])  # fmt: skip
    check("fma.rn.ftz.f32", [(tiny, f32(1.0), f32(2.0))], lambda *_: f32(2.0))
    check("cvt.rmi.ftz.f32.f32", [(f32(-1.5),), (tiny,)], lambda x: f32(0) if x == tiny else f32(-2))


def test_packed_numbers_are_computed_apart():
    two = lambda low, high: f32(low) | f32(high) << 32  # noqa: E731
    a, b, c = two(1.5, -2.0), two(4.0, 0.5), two(1.0, 3.0)
    for rounding in ("", ".rn"):
        check(f"add{rounding}.f32x2", [(a, b)], lambda *_: two(5.5, -1.5))
        check(f"sub{rounding}.f32x2", [(a, b)], lambda *_: two(-2.5, -2.5))
        check(f"mul{rounding}.f32x2", [(a, b)], lambda *_: two(6.0, -1.0))
    check("fma.rn.f32x2", [(a, b, c)], lambda *_: two(7.0, 2.0))


def test_mixed_sums_widen_their_first_operand():
    for name, sign in (("add", 1), ("sub", -1)):
        check(f"{name}.rn.f32.bf16", [(0x3FC0, f32(0.25))], lambda *_, s=sign: f32(1.5 + s * 0.25))
        check(f"{name}.rn.f32.f16", [(f16(1.5), f32(0.25))], lambda *_, s=sign: f32(1.5 + s * 0.25))


def test_sign_operations_touch_the_sign_only():
    values = [(f32(x),) for x in NUMBERS]
    check("neg.f32", values, lambda x: x ^ 0x80000000)
    check("abs.f32", values, lambda x: x & 0x7FFFFFFF)


def test_a_maximum_drops_nan_unless_it_says_otherwise():
    nan, one, two = f32(math.nan), f32(1.0), f32(2.0)
    pairs = [(nan, one), (one, nan), (one, two), (two, one)]
    check("max.f32", pairs, lambda a, b: one if nan in (a, b) else two)
    check("min.f32", pairs, lambda a, b: one)
    check("max.NaN.f32", pairs[2:], lambda a, b: two)
    check("min.NaN.f32", pairs[2:], lambda a, b: one)
    for opcode in ("max.NaN.f32", "min.NaN.f32"):
        bits = compute(opcode, "f32", ("f32", "f32"), pairs[:2])
        assert all(math.isnan(number(x)) for x in bits)


def test_plus_zero_is_larger_than_minus_zero():
    zero, minus = f32(0.0), f32(-0.0)
    pairs = [(zero, minus), (minus, zero), (zero, zero), (minus, minus)]
    for modifier in ("", ".NaN"):
        check(f"max{modifier}.f32", pairs, lambda a, b: a & b)
        check(f"min{modifier}.f32", pairs, lambda a, b: a | b)


def test_a_maximum_of_three_sources_is_that_of_two_pairs():
    triples = [tuple(f32(x) for x in t) for t in ((1, 2, 3), (3, 1, 2), (2, 3, 1), (math.nan, 2, 1))]
    for name, of_two in (("max", np.fmax), ("min", np.fmin)):
        check(f"{name}.f32 of 3", triples, lambda *bits, f=of_two: f32(f.reduce([np.float32(number(x)) for x in bits])))
        check(f"{name}.NaN.f32 of 3", triples[:3], lambda *bits, f=of_two: f32(f.reduce([number(x) for x in bits])))
        assert math.isnan(number(compute(f"{name}.NaN.f32", "f32", ("f32",) * 3, triples[3:4])[0]))


def test_division_and_roots_of_exact_form_round_once():
    check("div.rn.f32", [p for p in PAIRS if number(p[1]) != 0], same_or_nan(lambda a, b: a / b))
    squares = [(f32(x),) for x in (0.25, 2.0, 9.0, 1e30)]
    check("sqrt.rn.f32", squares, lambda x: f32(float(np.sqrt(np.float32(number(x))))))
    check("cvt.rmi.f32.f32", [(f32(x),) for x in (1.5, -1.5, 3.0, -0.25)], lambda x: f32(math.floor(number(x))))


def test_conversions_between_floating_types_round_to_even():
    check("cvt.rn.f32.f64", [(struct.unpack("<Q", struct.pack("<d", x))[0],) for x in (1 / 3, 1e300, -2.5)],
          lambda x: f32(struct.unpack("<d", struct.pack("<Q", x))[0]))  # fmt: skip
    check("cvt.f32.f16", [(f16(x),) for x in (1.5, -65504.0, 6e-8, math.inf)], lambda x: f32(half(x)))
    check("cvt.f32.bf16", [(0x3FC0,), (0xC2F7,), (0x0001,)], lambda x: x << 16)
    ties = [1.5, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 65520.0, 1e-8, -math.inf]
    check("cvt.rn.f16.f32", [(f32(x),) for x in ties], lambda x: f16(number(x)))
    # bf16 keeps 8 bits: 1 + 2^-8 is halfway to 1 + 2^-7 and goes to the even 1; 1 + 3 * 2^-8 goes to 1 + 2^-6.
    cases = {1.0: 0x3F80, 1 + 2.0**-8: 0x3F80, 1 + 3 * 2.0**-8: 0x3F82, 1 + 2.0**-8 + 2.0**-23: 0x3F81}
    cases |= {3.4e38: 0x7F80, -math.inf: 0xFF80, math.nan: 0x7FFF}
    check("cvt.rn.bf16.f32", [(f32(x),) for x in cases], {f32(x): bits for x, bits in cases.items()}.__getitem__)


def test_a_packed_conversion_puts_its_first_operand_in_the_upper_half():
    a, b = f32(1.0), f32(-2.0)
    check("cvt.rn.f16x2.f32", [(a, b)], lambda *_: f16(1.0) << 16 | f16(-2.0))
    check("cvt.rn.bf16x2.f32", [(a, b)], lambda *_: 0x3F80 << 16 | 0xC000)


@pytest.mark.parametrize("source", [f"{sign}{width}" for sign in "su" for width in (8, 16, 32, 64)])
def test_conversions_of_integers_extend_or_cut(source):
    width = int(source[1:])
    value = (lambda x: signed(x, width)) if source[0] == "s" else (lambda x: x)
    columns = [(x,) for x in integers(width)]
    check(f"cvt.rn.f32.{source}", columns, lambda x: f32(float(np.float32(value(x)))) if width < 64 else None)
    for result in (f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)):
        check(f"cvt.{result}.{source}", columns, lambda x, size=2 ** int(result[1:]): value(x) % size)


APPROXIMATE = {"ex2": lambda x: 2.0**x, "lg2": math.log2, "rcp": lambda x: 1 / x, "sqrt": math.sqrt}
APPROXIMATE |= {"rsqrt": lambda x: x**-0.5, "tanh": math.tanh}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_instructions_err_within_the_manuals_bound_and_use_it(name):
    values = [0.7, 1.3, 3.7, 11.2, 0.001] if name != "lg2" else [0.7, 1.3, 3.7, 1e30]
    columns, bound = [(f32(x),) for x in values], getattr(Approximations, name.upper())
    for flush in ("", ".ftz"):
        opcode = f"{name}.approx{flush}.f32"
        exact = [f32(APPROXIMATE[name](number(x))) for (x,) in columns]
        check(opcode, columns, dict(zip([x for (x,) in columns], exact, strict=True)).__getitem__)
        noisy = compute(opcode, "f32", ("f32",), columns, amplitude=1.0)
        errors = [abs(number(a) / number(e) - 1) for a, e in zip(noisy, exact, strict=True)]
        assert max(errors) > 0
        slack = 2.0**-23 + (bound / abs(math.log2(0.7)) if name == "lg2" else 0)
        assert max(errors) <= bound + slack
        assert compute(opcode, "f32", ("f32",), columns, amplitude=1.0) == noisy


def test_approximate_division_errs_within_two_ulp():
    pairs = [(f32(a), f32(b)) for a, b in itertools.product([1.0, 3.7, -2e10], [3.0, 0.7, 1e-5])]
    for opcode in ("div.full.f32", "div.approx.f32", "div.full.ftz.f32", "div.approx.ftz.f32"):
        check(opcode, pairs, same_or_nan(lambda a, b: a / b))
        noisy = compute(opcode, "f32", ("f32", "f32"), pairs, amplitude=1.0)
        exact = [number(a) / number(b) for a, b in pairs]
        errors = [abs(number(x) / e - 1) for x, e in zip(noisy, exact, strict=True)]
        assert 0 < max(errors) <= Approximations.DIV + 2.0**-23


def test_a_quick_division_by_a_huge_number_is_zero():
    huge = [(f32(1e38), f32(2.0**127)), (f32(-1e38), f32(3e38)), (f32(1e38), f32(2.0**126)), (f32(1.0), f32(math.inf))]
    exact = dict(zip(huge, [0.0, -0.0, 1e38 / 2.0**126, 0.0], strict=True))
    check("div.approx.f32", huge, lambda a, b: f32(exact[a, b]))
    assert math.isnan(number(compute("div.approx.f32", "f32", ("f32", "f32"), [(f32(math.inf), f32(3e38))])[0]))


# Instructions that move data


def test_halves_are_packed_and_unpacked_in_order():
    body = """
    ld.global.b32 %r1, [%rd90];
    mov.b32 {%rs1, %rs2}, %r1;
    mov.b32 %r2, {%rs2, %rs1};
    mov.b64 %rd1, {%r1, %r2};
    mov.b64 {_, %r3}, %rd1;
    st.global.b32 [%rd99], %r3;
    """
    assert execute(body, [bits_array([0x1234ABCD], 32)], 4).view(np.uint32)[0] == 0xABCD1234


def test_vectors_are_loaded_and_stored_in_order():
    data = np.arange(4 * THREADS, dtype=np.uint32).reshape(THREADS, 4).copy().view(np.dtype("V16")).ravel()
    body = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd90 + 0];
    shl.b32 %r5, %r90, 4;
    st.shared.v4.b32 [%r5], {%r4, %r3, %r2, %r1};
    ld.shared.v2.b64 {%rd1, %rd2}, [%r5];
    mov.b64 {%r6, %r7}, %rd2;
    st.global.v4.b32 [%rd99], {%r6, %r7, %r90, %r1};
    """
    out = execute(body, [data], 16, shared=16 * THREADS).view(np.uint32).reshape(THREADS, 4)
    assert out[3].tolist() == [13, 12, 3, 12]


def test_bytes_extend_with_zeros_and_store_their_low_part():
    body = """
    ld.global.b8 %rs1, [%rd90];
    st.shared.b8 [%r90], %rs1;
    ld.shared.b8 %rs2, [%r90];
    cvt.u32.u16 %r1, %rs2;
    st.global.b32 [%rd99], %r1;
    """
    assert execute(body, [bits_array([0xFE], 8)], 4).view(np.uint32)[0] == 0xFE


def test_a_predicate_limits_a_load_to_its_threads():
    body = """
    setp.lt.u32 %p1, %r90, 2;
    mov.u32 %r1, 77;
    @%p1 ld.global.b32 %r1, [%rd90];
    @!%p1 add.s32 %r1, %r1, 1;
    st.global.b32 [%rd99], %r1;
    """
    assert execute(body, [bits_array([5], 32)], 4).view(np.uint32)[:4].tolist() == [5, 5, 78, 78]


SHUFFLES = {
    ("bfly", 1, 31): lambda lane: lane ^ 1,
    ("up", 3, 0): lambda lane: lane - 3 if lane >= 3 else lane,
    ("down", 2, 31): lambda lane: lane + 2 if lane < 30 else lane,
    ("idx", 5, 31): lambda lane: 5,
    ("bfly", 33, 31): lambda lane: lane ^ 1,  # modulo 32
    ("bfly", 8, 0x1807): lambda lane: lane ^ 8 if lane & 8 else lane,  # beyond the last lane of eight: its own
    ("idx", 3, 0x181F): lambda lane: lane // 8 * 8 + 3,
}


@pytest.mark.parametrize("key", SHUFFLES, ids=str)
def test_a_shuffle_takes_from_the_lane_that_the_manual_says(key):
    mode, distance, clamp = key
    body = f"""
    shfl.sync.{mode}.b32 %r1, %r90, {distance}, {clamp}, -1;
    st.global.b32 [%rd99], %r1;
    """
    lanes = execute(body, [bits_array([0], 32)], 4).view(np.uint32).tolist()
    assert lanes == [SHUFFLES[key](lane) for lane in range(THREADS)]


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [("redux.sync.max.s32", 30), ("redux.sync.min.s32", 2**32 - 1), ("redux.sync.add.s32", 464)],
)
def test_a_warp_reduction_of_integers_covers_all_lanes(opcode, expected):
    body = f"add.s32 %r1, %r90, -1;\n{opcode} %r2, %r1, -1;\nst.global.b32 [%rd99], %r2;"
    assert set(execute(body, [bits_array([0], 32)], 4).view(np.uint32).tolist()) == {expected}


def test_a_warp_reduction_of_numbers_drops_nan():
    body = "ld.global.b32 %r1, [%rd90];\nredux.sync.max.f32 %r2, %r1, -1;\nst.global.b32 [%rd99], %r2;"
    values = [f32(math.nan), f32(-2.0), f32(3.5)]
    assert set(execute(body, [bits_array(values, 32)], 4).view(np.uint32).tolist()) == {f32(3.5)}


def test_matrices_go_to_the_lanes_that_the_manual_says():
    """Lane 8 m + i holds the address of row i of matrix m; lane 4 i + j gets its elements 2 j and 2 j + 1."""
    body = """
    mul.lo.s32 %r1, %r90, 16;
    mad.lo.s32 %r2, %r90, 256, 255;
    st.shared.b32 [%r1], %r2;
    st.shared.b32 [%r1 + 4], %r90;
    st.shared.b64 [%r1 + 8], %rd99;
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r1];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r6, %r5, %r4, %r3};
    bar.sync 0;
    ld.shared.b32 %r7, [%r1];
    st.global.v2.b32 [%rd99], {%r4, %r7};
    """
    out = execute(body, [bits_array([0], 32)], 8, shared=16 * THREADS).view(np.uint32).reshape(THREADS, 2)
    assert out[4].tolist() == [256 * 9 + 255, 256 * 28 + 255]  # row 1 of matrix 1, and row 4 of matrix 0, now of 3
    assert out[5, 0] == 9


def test_a_barrier_of_a_warp_changes_nothing():
    body = "bar.warp.sync -1;\nst.global.b32 [%rd99], %r90;"
    assert execute(body, [bits_array([0], 32)], 4).view(np.uint32).tolist() == list(range(THREADS))


def test_a_uniform_loop_runs_as_often_as_its_counter_says():
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
$L__BB0_1:
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, 5;
    @%p1 bra $L__BB0_1;
    bra.uni $L__BB0_2;
$L__BB0_2:
    st.global.b32 [%rd99], %r2;
    """
    assert execute(body, [bits_array([0], 32)], 4).view(np.uint32)[0] == 10


@pytest.mark.parametrize("line", ["{ mov.b32 %r1, 2; }", ".reg .b32 %r1; mov.b32 %r1, 1;", "max.f32 %r1, %r2;"])
def test_text_that_would_be_skipped_raises_an_error(line):
    with pytest.raises(UnknownPTX):
        execute(line, [bits_array([0], 32)], 4)


@pytest.mark.parametrize(
    "line", ["@%p1 shfl.sync.bfly.b32 %r1, %r90, 1, 31, -1;", "@%p1 redux.sync.add.s32 %r1, %r90, -1;"]
)
def test_an_exchange_with_a_predicate_raises_an_error(line):
    with pytest.raises(UnknownPTX, match="a predicate of"):
        execute(f"setp.eq.s32 %p1, %r90, 0;\n{line}", [bits_array([0], 32)], 4)


@pytest.mark.parametrize(
    "line", ["sin.approx.f32 %r1, %r90;", "atom.global.add.u32 %r1, [%rd90], 1;", "ld.const.b32 %r1, [%rd90];"]
)
def test_an_unknown_instruction_raises_an_error_that_names_it(line):
    with pytest.raises(UnknownPTX, match=re.escape(line.split()[0])):
        execute(line, [bits_array([0], 32)], 4)


def test_text_without_a_kernel_raises_an_error():
    with pytest.raises(UnknownPTX, match=r"has no \.entry"):
        Kernel("// nothing")
