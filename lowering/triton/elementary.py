"""Elementary functions as Triton functions on f32: what kernels call and Triton has not, or has only approximately.

Against exact values: exp, tanh, sigmoid and silu within 4 units in the last place where the result is normal, expm1, log1p and
softplus within 3e-7 relative, power within 1 unit (it computes in f64). NaN gives NaN.
"""

from __future__ import annotations

from qcompile.lowering.triton.text import called, named

_FUNCTIONS = '''
@triton.jit
def exp(x):
    """e^x = 2^n e^r, |r| <= log(2) / 2, by a polynomial of degree 6; 0 below -87.33 and infinity above 88.7228."""
    inside = tl.minimum(tl.maximum(x, -87.33), 88.7228)
    # 1.5 * 2^23 rounds what is added to it to an integer, which is then in the low bits; 2^128 is no float.
    shifted = tl.minimum(inside, 88.02) * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = inside - n * 0.693359375 + n * 2.12194440e-4
    p = 1.9875691e-4
    p = p * r + 1.3981999e-3
    p = p * r + 8.3334519e-3
    p = p * r + 4.1665795e-2
    p = p * r + 0.16666665459
    p = p * r + 0.5
    p = p * r * r + r
    two_n = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    y = p * two_n + two_n
    y = tl.where(x > 88.7228, float("inf"), tl.where(x < -87.33, 0.0, y))
    return tl.where(x == x, y, x)


@triton.jit
def expm1(x):
    """e^x - 1: its series where |x| < 0.5, which keeps small results exact."""
    p = x * 2.48015873e-5 + 1.98412698e-4
    p = p * x + 1.38888889e-3
    p = p * x + 8.33333333e-3
    p = p * x + 4.16666667e-2
    p = p * x + 0.166666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.5, p * x * x + x, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), where the rounding of 1 + x is put right."""
    one = x + 1.0
    y = tl.log(one) + (x - (one - 1.0)) / one
    y = tl.where(tl.abs(x) < 1e-7, x, y)
    return tl.where(one == float("inf"), one, tl.where(x == -1.0, float("-inf"), y))


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.where(x < 0.0, 0.0, x) + log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (exp(-x) + 1.0)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (exp(-x) + 1.0)


@triton.jit
def tanh(x):
    """A polynomial of degree 11 for |x| < 0.625, else 1 - 2 / (e^2|x| + 1) with the sign of x."""
    size = tl.abs(x)
    square = x * x
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 0.133314422036
    p = p * square - 0.333332819422
    large = 1.0 - 2.0 / (exp(size + size) + 1.0)
    return tl.where(size < 0.625, p * square * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def gelu(x):
    """x / 2 (1 + erf(x / sqrt(2)))."""
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x * 0.5 * (1.0 + tanh(x * (x * x * 0.035677408136300125 + 0.7978845608028654)))


@triton.jit
def power(x, y):
    """x^y as C has it: negative x only for whole y, x^0 = 1^y = 1."""
    a, b = tl.abs(x).to(tl.float64), y.to(tl.float64)
    size = tl.exp(b * tl.log(a)).to(tl.float32)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    size = tl.where(odd & (x.to(tl.int32, bitcast=True) < 0), -size, size)
    size = tl.where((x < 0.0) & (x > float("-inf")) & (whole == 0), float("nan"), size)
    one = (y == 0.0) | (x == 1.0) | ((x == -1.0) & (tl.abs(y) == float("inf")))
    return tl.where(one, 1.0, size)


@triton.jit
def truncate(x):
    """Toward zero."""
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even."""
    size = tl.abs(x)
    near = (size + 8388608.0) - 8388608.0
    near = tl.where(size < 8388608.0, near, size)
    return tl.where(x < 0.0, -near, near)


@triton.jit
def floor_divide(a, b):
    """Integers, toward minus infinity."""
    q = a // b
    return tl.where((q * b != a) & ((a < 0) != (b < 0)), q - 1, q)


@triton.jit
def to_i32(x):
    """f32 toward zero, limited to what an i32 holds; NaN gives 0."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -2147483648.0), 2147483520.0).to(tl.int32)


@triton.jit
def to_i64(x):
    """f32 toward zero, limited to what an i64 holds; NaN gives 0."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -9223372036854775808.0), 9223371487098961920.0).to(tl.int64)


@triton.jit
def f8e5m2_to_f32(byte):
    """The value of an f8e5m2, whose bits are the upper half of an f16's."""
    return (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def f8e4m3_to_f32(byte):
    """The value of an f8e4m3: with its mantissa at f16's place only the exponent's bias differs, by 8."""
    bits = byte.to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)


@triton.jit
def f8e8m0_to_f32(byte):
    """A power of two and no sign; 2^-127 is below the exponents of f32, and 255 is NaN."""
    bits = byte.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.float32, bitcast=True)


@triton.jit
def f32_to_f8(x, mantissa: tl.constexpr, bias: tl.constexpr, ground: tl.constexpr, most: tl.constexpr, over, nan):
    """The bits of the 8-bit float nearest to x (ties to even); from `most` on they are `over`.

    Added to `ground`, numbers below the smallest with a whole mantissa are rounded to the last bit that their codes have.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    drop: tl.constexpr = 23 - mantissa
    normal = ((size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop) - ((127 - bias) << mantissa)
    low = tl.full([], ground, tl.float32)
    small = (tl.abs(x) + low).to(tl.int32, bitcast=True) - low.to(tl.int32, bitcast=True)
    code = tl.where(size < ((128 - bias) << 23), small, normal)
    code = tl.where(x == x, tl.where(tl.abs(x) < most, code, over), nan)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def bf16(x):
    """x rounded to the nearest bf16 (ties to even), as f32."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def f16(x):
    """x rounded to the nearest f16 (ties to even), as f32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def f32_to_f8e4m3(x):
    """Numbers too large give the greatest, as torch's `to` has it."""
    return f32_to_f8(x, 3, 7, 16384.0, 464.0, 0x7E, 0x7F)


@triton.jit
def f32_to_f8e5m2(x):
    """Numbers too large give infinity."""
    return f32_to_f8(x, 2, 15, 128.0, 65536.0, 0x7C, 0x7F)
'''

FUNCTIONS = named(_FUNCTIONS)
"""Name -> text. A function calls only those before it."""


def functions(body: str) -> str:
    """The texts of all functions that `body` calls, and of those that they call."""
    return called(FUNCTIONS, body)
