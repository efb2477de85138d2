"""Elementary functions as straight-line MLIR text on float32 values: exp, tanh, erf and the activations made of them.

Every function takes and returns a `text.Value` (scalar or vector). Errors against exact values are at most 3 units in
the last place where the result is normal (erf and both gelu: 8e-7 absolute, times |x| above 1); NaN gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qcompile.lowering.mlir.text import Value


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's rule; the highest power first."""
    total = x.text.constant(coefficients[0], x.type)
    for c in coefficients[1:]:
        total = x.text.fma(total, x, x.text.constant(c, x.type))
    return total


def exp(x: Value) -> Value:
    """e^x = 2^n * e^r, |r| <= log(2) / 2, by a polynomial of degree 6; 0 below -87.33 and infinity above 88.7228."""
    t = x.text
    inside = t.select(x > 88.7228, 88.7228, t.select(x < -87.33, -87.33, x))
    # n is at most 127, for 2^128 is no float: r grows to log(2) at the end. Adding 1.5 * 2^23 rounds to an integer that
    # is then in the low bits.
    magic = t.constant(12582912.0, x.type)
    shifted = t.fma(t.select(inside > 88.02, 88.02, inside), t.constant(math.log2(math.e), x.type), magic)
    n = shifted - magic
    r = t.fma(n, t.constant(2.12194440e-4, x.type), t.fma(n, t.constant(-0.693359375, x.type), inside))
    p = polynomial(r, (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665795e-2, 0.16666665459, 0.5))
    p = t.fma(p * r, r, r)
    power = t.cast("bitcast", (t.cast("bitcast", shifted, "i32") << 23) + 0x3F800000, "f32")
    y = t.fma(p, power, power)
    return t.select(x > 88.7228, math.inf, t.select(x < -87.33, 0.0, y))


def sigmoid(x: Value) -> Value:
    return 1.0 / (exp(-x) + 1.0)


def silu(x: Value) -> Value:
    return x / (exp(-x) + 1.0)


def relu(x: Value) -> Value:
    return x.text.select(x < 0.0, 0.0, x)


def tanh(x: Value) -> Value:
    """A polynomial of degree 11 for |x| < 0.625, else 1 - 2 / (e^2|x| + 1) with the sign of x."""
    t, square = x.text, x * x
    size = t.math("absf", x)
    p = polynomial(square, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 0.133314422036, -0.333332819422))
    large = 1.0 - 2.0 / (exp(size + size) + 1.0)
    large = t.op(f"math.copysign {large}, {x} : {x.type}", x.type)
    return t.select(size < 0.625, t.fma(p * square, x, x), large)


# The rational approximation of erf on [-4, 4] that Eigen and XLA use: x P(x^2) / Q(x^2).
_ERF_P = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_Q = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)  # fmt: skip


def erf(x: Value) -> Value:
    x = x.text.select(x > 4.0, 4.0, x.text.select(x < -4.0, -4.0, x))
    return x * polynomial(x * x, _ERF_P) / polynomial(x * x, _ERF_Q)


def gelu(x: Value) -> Value:
    """x / 2 * (1 + erf(x / sqrt(2)))."""
    return x.text.fma(x * 0.5, erf(x * math.sqrt(0.5)), x * 0.5)


def gelu_tanh(x: Value) -> Value:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    scale = math.sqrt(2 / math.pi)
    return x.text.fma(x * 0.5, tanh(x * (x * x * (0.044715 * scale) + scale)), x * 0.5)


ACTIVATIONS: dict[str, Callable[[Value], Value]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
    "tanh": tanh,
}
