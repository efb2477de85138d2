"""More elementary functions as straight-line MLIR text on float32 values: log, sin, cos, pow and their relatives.

Every function takes and returns a `text.Value` (scalar or vector). Against exact values: log, log1p, expm1, sin and cos
within 2e-7 relative or absolute, sin and cos for |x| up to 2^31; pow within 2e-5 relative. NaN gives NaN.
"""

from __future__ import annotations

import math

from qcompile.lowering.mlir.text import Value
from qcompile.lowering.mlir.vecmath import exp, polynomial


def _bits(x: Value) -> Value:
    return x.text.cast("bitcast", x, "i32")


def _fma(a: Value, b: Value | float, c: Value | float) -> Value:
    return a.text.fma(a, a.text.constant(b, a.type), a.text.constant(c, a.type))


def absolute(x: Value) -> Value:
    return x.text.math("absf", x)


def with_sign(x: Value, sign: Value) -> Value:
    """x with the sign of `sign`."""
    return x.text.op(f"math.copysign {x}, {sign} : {x.type}", x.type)


def log(x: Value) -> Value:
    """log(m) + e log(2) with m in [sqrt(1/2), sqrt(2)); the polynomial is that of Cephes' logf."""
    t = x.text
    tiny = x < 1.17549435e-38
    offset = _bits(t.select(tiny, x * 8388608.0, x)) - 0x3F3504F3
    e = t.cast("sitofp", offset.signed_shift(23), "f32")
    e = t.select(tiny, e - 23.0, e)
    m = t.cast("bitcast", (offset & 0x007FFFFF) + 0x3F3504F3, "f32") - 1.0
    p = polynomial(m, (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1))  # fmt: skip
    square = m * m
    y = _fma(e, -2.12194440e-4, p * m * square)
    y = _fma(e, 0.693359375, _fma(square, -0.5, y) + m)
    y = t.select(x.equals(math.inf), math.inf, t.select(x.equals(0.0), -math.inf, y))
    return t.select(x.compare("ult", 0.0), math.nan, y)


def log1p(x: Value) -> Value:
    """log(1 + x), where the rounding of 1 + x is put right."""
    t, one = x.text, x + 1.0
    y = log(one) + (x - (one - 1.0)) / one
    y = t.select(absolute(x) < 1e-7, x, y)
    return t.select(one.equals(math.inf), math.inf, t.select(x.equals(-1.0), -math.inf, y))


def expm1(x: Value) -> Value:
    """e^x - 1: its series where |x| < 0.5, which keeps small results exact."""
    series = polynomial(x, (1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5))
    return x.text.select(absolute(x) < 0.5, _fma(series * x, x, x), exp(x) - 1.0)


def softplus(x: Value) -> Value:
    """log(1 + e^x)."""
    return x.text.select(x < 0.0, 0.0, x) + log1p(exp(-absolute(x)))


def _turned(x: Value, quarters: int) -> Value:
    """sin(x + quarters * pi / 2). The quadrant is taken off in float64, so that positions in the millions work."""
    t = x.text
    inside = t.select(absolute(x) < 2147483648.0, x, 0.0)
    wide = t.cast("extf", inside, "f64")
    shifted = _fma(wide, 2.0 / math.pi, 6755399441055744.0)  # 1.5 * 2^52 rounds to an integer, in the low bits
    rest = t.cast("truncf", _fma(shifted - 6755399441055744.0, -math.pi / 2, wide), "f32")
    quadrant = t.cast("trunci", t.cast("bitcast", shifted, "i64"), "i32") + quarters
    square = rest * rest
    sine = polynomial(square, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
    sine = _fma(sine * square, rest, rest)
    cosine = polynomial(square, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = _fma(cosine * square, square, _fma(square, -0.5, 1.0))
    y = _bits(t.select((quadrant & 1).equals(1), cosine, sine))
    y = t.op(f"arith.xori {y}, {(quadrant & 2) << 30} : {y.type}", y.type)
    return t.select(absolute(x) < math.inf, t.cast("bitcast", y, "f32"), math.nan)


def sin(x: Value) -> Value:
    return _turned(x, 0)


def cos(x: Value) -> Value:
    return _turned(x, 1)


def pow(x: Value, y: Value) -> Value:
    """x^y as C has it: negative x only for whole y, x^0 = 1^y = 1."""
    t = x.text
    whole, half = t.math("trunc", y).equals(y), y * 0.5
    odd = t.math("trunc", half).compare("une", half) & whole
    size = exp(y * log(absolute(x)))
    size = t.select(odd, with_sign(size, x), size)
    size = t.select((x < 0.0) & (x > -math.inf), t.select(whole, size, math.nan), size)
    return t.select(y.equals(0.0), 1.0, t.select(x.equals(1.0), 1.0, size))
