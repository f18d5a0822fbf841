"""What each PTX instruction computes, as a NumPy expression over its operands: {0} is the first source.

An entry is opcode -> (kind of the result, kinds of the sources, expression); "max.f32 of 3" is max.f32 with three
sources. A kind is a PTX type: b32 and u32 are
unsigned, s32 is signed, f32 a number, pred a bool; bf16 and f32x2 stay bits. Loads, stores, branches, barriers and
instructions that exchange registers between threads are in translate.py.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    result: str
    sources: tuple[str, ...]
    expression: str


def _integer_rules() -> dict[str, Rule]:
    rules = {}
    for width in (16, 32, 64):
        b, u, s = f"b{width}", f"u{width}", f"s{width}"
        for name, symbol in (("and", "&"), ("or", "|"), ("xor", "^")):
            rules[f"{name}.{b}"] = Rule(b, (b, b), f"{{0}} {symbol} {{1}}")
        rules[f"not.{b}"] = Rule(b, (b,), "~{0}")
        rules[f"shl.{b}"] = Rule(b, (b, "u32"), "shift_left({0}, {1})")
        rules[f"neg.{s}"] = Rule(b, (b,), "~{0} + {0}.dtype.type(1)")
        for kind in (s, u):
            for name, symbol in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
                rules[f"{name}.{kind}"] = Rule(b, (b, b), f"{{0}} {symbol} {{1}}")
            rules[f"mad.lo.{kind}"] = Rule(b, (b, b, b), "{0} * {1} + {2}")
            rules[f"shr.{kind}"] = Rule(kind, (kind, "u32"), "shift_right({0}, {1})")
            rules[f"div.{kind}"] = Rule(kind, (kind, kind), "quotient({0}, {1})")
            rules[f"rem.{kind}"] = Rule(kind, (kind, kind), "remainder({0}, {1})")
            rules[f"min.{kind}"] = Rule(kind, (kind, kind), "np.minimum({0}, {1})")
            rules[f"max.{kind}"] = Rule(kind, (kind, kind), "np.maximum({0}, {1})")
        for kind, wide, dtype in ((s, f"s{2 * width}", f"I{2 * width}"), (u, f"u{2 * width}", f"U{2 * width}")):
            if width < 64:
                product = f"{{0}}.astype({dtype}) * {{1}}.astype({dtype})"
                rules[f"mul.wide.{kind}"] = Rule(wide, (kind, kind), product)
                rules[f"mad.wide.{kind}"] = Rule(wide, (kind, kind, wide), f"{product} + {{2}}")
    for name, symbol in (("and", "&"), ("or", "|"), ("xor", "^")):
        rules[f"{name}.pred"] = Rule("pred", ("pred", "pred"), f"{{0}} {symbol} {{1}}")
    rules["not.pred"] = Rule("pred", ("pred",), "~{0}")
    for kind in ("u32", "s32", "u64", "s64"):
        rules[f"bfe.{kind}"] = Rule(kind, (kind, "u32", "u32"), "bit_field({0}, {1}, {2})")
    rules["prmt.b32"] = Rule("b32", ("b32", "b32", "b32"), "permute_bytes({0}, {1}, {2})")
    return rules


def _compare_numbers(rules: dict[str, Rule], name: str, expression: str) -> None:
    """A comparison of fp16, fp32 and bf16; a bf16 is its bits, and is widened."""
    for kind in ("f16", "f32"):
        rules[f"{name}.{kind}"] = Rule("pred", (kind, kind), expression)
    wide = expression.format("bf16_to_f32({0})", "bf16_to_f32({1})")
    rules[f"{name}.bf16"] = Rule("pred", ("b16", "b16"), wide)


def _comparison_rules() -> dict[str, Rule]:
    rules = {}
    symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for name, symbol in symbols.items():
        for width in (16, 32, 64):
            for kind in (f"s{width}", f"u{width}", f"b{width}"):
                rules[f"setp.{name}.{kind}"] = Rule("pred", (kind, kind), f"{{0}} {symbol} {{1}}")
        # NumPy's comparisons are false for NaN, like PTX's ordered ones, but for !=.
        ordered = "({0} < {1}) | ({0} > {1})" if name == "ne" else f"{{0}} {symbol} {{1}}"
        unordered = f"({{0}} {symbol} {{1}}) | np.isnan({{0}}) | np.isnan({{1}})"
        _compare_numbers(rules, f"setp.{name}", ordered)
        _compare_numbers(rules, f"setp.{name}u", unordered)
    _compare_numbers(rules, "setp.nan", "np.isnan({0}) | np.isnan({1})")
    _compare_numbers(rules, "setp.num", "~(np.isnan({0}) | np.isnan({1}))")
    for kind in ("b16", "b32", "b64", "s32", "u32", "f32", "f64"):
        rules[f"selp.{kind}"] = Rule(kind, (kind, kind, "pred"), "np.where({2}, {0}, {1})")
    return rules


def _float_rules() -> dict[str, Rule]:
    rules = {
        "neg.f32": Rule("b32", ("b32",), "{0} ^ U32(0x80000000)"),
        "abs.f32": Rule("b32", ("b32",), "{0} & U32(0x7FFFFFFF)"),
        "fma.rn.f32": Rule("f32", ("f32", "f32", "f32"), "fma({0}, {1}, {2})"),
        "fma.rn.ftz.f32": Rule("f32", ("f32",) * 3, "flush(fma(flush({0}), flush({1}), flush({2})))"),
        "fma.rn.f32x2": Rule("f32x2", ("f32x2",) * 3, "pairs(fma, {0}, {1}, {2})"),
        "div.rn.f32": Rule("f32", ("f32", "f32"), "{0} / {1}"),
        "sqrt.rn.f32": Rule("f32", ("f32",), "np.sqrt({0})"),
        "cvt.rmi.f32.f32": Rule("f32", ("f32",), "np.floor({0})"),
        "cvt.rmi.ftz.f32.f32": Rule("f32", ("f32",), "np.floor(flush({0}))"),
        "cvt.rn.f32.f64": Rule("f32", ("f64",), "{0}.astype(F32)"),
        "cvt.f32.f16": Rule("f32", ("f16",), "{0}.astype(F32)"),
        "cvt.f32.bf16": Rule("f32", ("b16",), "bf16_to_f32({0})"),
        "cvt.rn.f16.f32": Rule("b16", ("f32",), "f32_to_f16({0})"),
        "cvt.rn.bf16.f32": Rule("b16", ("f32",), "f32_to_bf16({0})"),
        # The first source becomes the upper half.
        "cvt.rn.f16x2.f32": Rule("b32", ("f32", "f32"), "pack(f32_to_f16({1}), f32_to_f16({0}))"),
        "cvt.rn.bf16x2.f32": Rule("b32", ("f32", "f32"), "pack(f32_to_bf16({1}), f32_to_bf16({0}))"),
    }
    for name, symbol in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for rounding in ("", ".rn"):
            rules[f"{name}{rounding}.f32"] = Rule("f32", ("f32", "f32"), f"{{0}} {symbol} {{1}}")
            flushed = f"flush(flush({{0}}) {symbol} flush({{1}}))"
            rules[f"{name}{rounding}.ftz.f32"] = Rule("f32", ("f32", "f32"), flushed)
            rules[f"{name}{rounding}.f32x2"] = Rule("f32x2", ("f32x2", "f32x2"), f"pairs(np_{name}, {{0}}, {{1}})")
        if name != "mul":  # sm_100: the first source is widened
            rules[f"{name}.rn.f32.bf16"] = Rule("f32", ("b16", "f32"), f"bf16_to_f32({{0}}) {symbol} {{1}}")
            rules[f"{name}.rn.f32.f16"] = Rule("f32", ("f16", "f32"), f"{{0}}.astype(F32) {symbol} {{1}}")
    for name, function in (("max", "maximum"), ("min", "minimum")):
        for modifier, used in (("", function), (".NaN", f"{function}_or_nan")):
            opcode = f"{name}{modifier}.f32"
            rules[opcode] = Rule("f32", ("f32", "f32"), f"{used}({{0}}, {{1}})")
            rules[f"{opcode} of 3"] = Rule("f32", ("f32",) * 3, f"{used}({used}({{0}}, {{1}}), {{2}})")  # sm_100
    for name in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"):
        rules[f"{name}.approx.f32"] = Rule("f32", ("f32",), f"approximate.{name}({{0}})")
        rules[f"{name}.approx.ftz.f32"] = Rule("f32", ("f32",), f"flush(approximate.{name}(flush({{0}})))")
    for name, function in (("full", "approximate.div"), ("approx", "approximate.div_approx")):
        rules[f"div.{name}.f32"] = Rule("f32", ("f32", "f32"), f"{function}({{0}}, {{1}})")
        rules[f"div.{name}.ftz.f32"] = Rule("f32", ("f32", "f32"), f"flush({function}(flush({{0}}), flush({{1}})))")
    return rules


def _conversion_rules() -> dict[str, Rule]:
    """Between integers, and from integers to fp32."""
    rules = {}
    integers = [f"{sign}{width}" for sign in "su" for width in (8, 16, 32, 64)]
    for source in integers:
        rules[f"cvt.rn.f32.{source}"] = Rule("f32", (source,), "{0}.astype(F32)")
        for result in integers:
            dtype = result.upper().replace("S", "I")
            rules[f"cvt.{result}.{source}"] = Rule(result, (source,), f"{{0}}.astype({dtype})")
    for width in (16, 32, 64):
        for sign in "bsu":
            rules[f"mov.{sign}{width}"] = Rule(f"b{width}", (f"b{width}",), "{0}")
    rules["mov.f32"] = Rule("f32", ("f32",), "{0}")
    rules["mov.pred"] = Rule("pred", ("pred",), "{0}")
    return rules


RULES: dict[str, Rule] = _integer_rules() | _comparison_rules() | _float_rules() | _conversion_rules()
