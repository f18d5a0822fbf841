"""Arithmetic of PTX instructions that NumPy does not have, on arrays with one element for each thread.

A value that is the same in all threads may be a NumPy scalar. Every function takes both.

Approximate instructions (ex2, lg2, rcp, sqrt, tanh, div) return the exact result times 1 + bound x noise, where
`bound` is the accuracy that NVIDIA's PTX manual gives and the noise is in [-1, 1]. The noise is a function of the
operands and of a seed, as a GPU computes a function too: equal operands give equal bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Value = Any  # a NumPy array with one element for each thread, or a NumPy scalar

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
SMALLEST_NORMAL = float(np.finfo(F32).tiny)
_TAIL, _HALF = U64((1 << 29) - 1), U64(1 << 28)  # bits of an fp64 beyond fp32, and their pattern halfway


def round_to_odd(product: Value, addend: Value, total: Value) -> Value:
    """product + addend in fp64, with the last bit set where it is inexact: rounding it again to fp32 is then right."""
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's exact error of a sum
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    fixed = np.where((error != 0) & (bits % 2 == 0), bits + away, bits)
    return np.where(np.isfinite(total), fixed.view(F64), total)


def fma(a: Value, b: Value, c: Value) -> Value:
    """a b + c in fp32, rounded once."""
    product = a.astype(F64) * b
    total = product + c
    halfway = (total.view(U64) & _TAIL) == _HALF
    subnormal = (np.abs(total) < 2 * SMALLEST_NORMAL) & (total != 0)
    if np.count_nonzero(halfway) or np.count_nonzero(subnormal):
        total = round_to_odd(product, c.astype(F64), total)
    return total.astype(F32)


def flush(x: Value) -> Value:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32(0), x), x)


def pairs(operation: Callable[..., Value], *operands: Value) -> Value:
    """An operation on .f32x2: two fp32 in 64 bits."""
    low = operation(*((x & U64(0xFFFFFFFF)).astype(U32).view(F32) for x in operands))
    high = operation(*((x >> U64(32)).astype(U32).view(F32) for x in operands))
    return low.view(U32).astype(U64) | (high.view(U32).astype(U64) << U64(32))


def bf16_to_f32(bits: Value) -> Value:
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: Value) -> Value:
    """Round to nearest, ties to even; NaN becomes 0x7fff."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def f32_to_f16(x: Value) -> Value:
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(F16).view(U16))


def pack(low: Value, high: Value) -> Value:
    """Two 16-bit halves in 32 bits."""
    return low.astype(U32) | (high.astype(U32) << U32(16))


def quotient(a: Value, b: Value) -> Value:
    """Integer division, rounded towards zero; what PTX leaves open, a division by zero, gives all ones."""
    one = b.dtype.type(1)
    divisor = np.where(b == 0, one, b)
    floor = a // divisor
    inexact = (floor * divisor != a) & ((a < 0) != (b < 0))
    return np.where(b == 0, ~(b ^ b), np.where(inexact, floor + one, floor))


def remainder(a: Value, b: Value) -> Value:
    return np.where(b == 0, a, a - quotient(a, b) * b)


def shift_left(x: Value, amount: Value) -> Value:
    width = 8 * x.dtype.itemsize
    clamped = np.minimum(amount, U32(width - 1)).astype(x.dtype)
    return np.where(amount < width, x << clamped, x.dtype.type(0))


def shift_right(x: Value, amount: Value) -> Value:
    """Arithmetic for signed x, logical for unsigned x."""
    width = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(amount, U32(width - 1)).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < width, shifted, x.dtype.type(0))


def bit_field(x: Value, position: Value, length: Value) -> Value:
    """bfe: `length` bits of x from `position` on, both modulo 256; a signed field repeats its highest bit."""
    position, length = position & U32(255), length & U32(255)
    bits = x.dtype.str.replace("i", "u")
    if x.dtype.kind == "u":
        one = x.dtype.type(1)
        return shift_right(x, position) & (shift_left(one, length) - one)
    width = U32(8 * x.dtype.itemsize)
    unused = width - np.minimum(length, width)
    upper = shift_left(shift_right(x, position).view(bits), unused).view(x.dtype)
    return np.where(length == 0, x.dtype.type(0), shift_right(upper, unused))


def permute_bytes(a: Value, b: Value, selector: Value) -> Value:
    """prmt.b32 in its default mode: each nibble of the selector picks a byte of (b, a), or its sign eight times."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    result = U32(0)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = (both >> ((nibble & U32(7)).astype(U64) * U64(8))) & U64(255)
        sign = np.where(byte >= 128, U64(255), U64(0))
        result = result | (np.where(nibble >= 8, sign, byte).astype(U32) << U32(8 * i))
    return result


def maximum(a: Value, b: Value) -> Value:
    """max.f32: a NaN is dropped, and +0 is larger than -0."""
    zeros = (a == 0) & (b == 0)
    larger = np.fmax(a, b)
    return np.where(zeros, a + b, larger) if np.count_nonzero(zeros) else larger


def minimum(a: Value, b: Value) -> Value:
    return -maximum(-a, -b)


def maximum_or_nan(a: Value, b: Value) -> Value:
    """max.NaN.f32: a NaN operand gives NaN."""
    return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), maximum(a, b))


def minimum_or_nan(a: Value, b: Value) -> Value:
    return -maximum_or_nan(-a, -b)


class Approximations:
    """Approximate instructions, perturbed within the accuracy that the PTX manual gives for them."""

    # Relative bounds. One fp32 ulp is at most 2^-23 of the number.
    EX2, SQRT, RSQRT, RCP, DIV, TANH = 2.0**-22, 2.0**-23, 2.0**-22.9, 2.0**-23, 2.0**-22, 2.0**-11
    LG2 = 2.0**-22  # relative, and absolute for operands in (0.5, 2)

    def __init__(self, seed: int = 0, amplitude: float = 1.0) -> None:
        """amplitude 0 gives correctly rounded results, 1 uses the whole accuracy of the manual."""
        self.key = U64(((2 * seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
        self.amplitude = amplitude

    def noise(self, *operands: Value) -> Value:
        """A number in [-amplitude, amplitude] for each thread, determined by the bits of its operands."""
        bits = self.key
        for x in operands:
            bits = (bits ^ x.view(U32).astype(U64)) * U64(0xBF58476D1CE4E5B9)
            bits = bits ^ (bits >> U64(29))
        return ((bits >> U64(11)).astype(F64) * 2.0**-52 - 1.0) * self.amplitude

    def _relative(self, exact: Value, bound: float, *operands: Value) -> Value:
        if not self.amplitude:
            return exact.astype(F32)
        return (exact * (1.0 + bound * self.noise(*operands))).astype(F32)

    def ex2(self, x: Value) -> Value:
        exact = np.exp2(x.astype(F64))
        return np.where(x == 0, F32(1), self._relative(exact, self.EX2, x))  # the manual: 2^0 is 1

    def lg2(self, x: Value) -> Value:
        exact = np.log2(x.astype(F64))
        absolute = (exact + self.LG2 * self.noise(x)).astype(F32) if self.amplitude else exact.astype(F32)
        return np.where((x > 0.5) & (x < 2), absolute, self._relative(exact, self.LG2, x))

    def rcp(self, x: Value) -> Value:
        return self._relative(1.0 / x.astype(F64), self.RCP, x)

    def sqrt(self, x: Value) -> Value:
        return self._relative(np.sqrt(x.astype(F64)), self.SQRT, x)

    def rsqrt(self, x: Value) -> Value:
        return self._relative(1.0 / np.sqrt(x.astype(F64)), self.RSQRT, x)

    def tanh(self, x: Value) -> Value:
        return self._relative(np.tanh(x.astype(F64)), self.TANH, x)

    def div(self, x: Value, y: Value) -> Value:
        """div.full."""
        return self._relative(x.astype(F64) / y, self.DIV, x, y)

    def div_approx(self, x: Value, y: Value) -> Value:
        """div.approx: zero, or NaN for an infinite x, where the divisor is above 2^126."""
        large = (np.abs(y) > F32(2.0**126)) & np.isfinite(y)
        return np.where(large, x * F32(0) * np.sign(y), self.div(x, y))
