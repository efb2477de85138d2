"""The operations inside a pointwise kernel (lowering.pointwise.OPS): name -> text on register lanes (see memory.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

from qcompile.lowering.mlir import elementary, vecmath
from qcompile.lowering.mlir.memory import FLOATS
from qcompile.lowering.mlir.text import Text, Value

Emit = Callable[..., Value]


def _op(name: str) -> Emit:
    """An arith or math operation of two operands by name."""
    return lambda t, dtype, a, b: t.op(f"{name} {a}, {b} : {a.type}", a.type)


def _by_kind(floats: Emit, integers: Emit, booleans: Emit | None = None) -> Emit:
    def emit(t: Text, dtype: str, *args: Value) -> Value:
        made = floats if dtype in FLOATS else booleans if dtype == "bool" and booleans else integers
        return made(t, dtype, *args)

    return emit


def _compare(name: str) -> Emit:
    def emit(t: Text, dtype: str, a: Value, b: Value) -> Value:
        if dtype in FLOATS:
            return a.compare("une" if name == "ne" else "o" + name, b)
        sign = "" if name in ("eq", "ne") else "u" if dtype in ("u8", "bool") else "s"
        return a.compare(sign + name, b)

    return emit


def _extreme(name: str) -> Emit:
    integers = {"max": ("maxsi", "maxui"), "min": ("minsi", "minui")}[name]
    return _by_kind(
        _op(f"arith.{name}imumf"),
        lambda t, dtype, a, b: _op(f"arith.{integers[dtype in ('u8', 'bool')]}")(t, dtype, a, b),
    )


def _math(name: str) -> Emit:
    return lambda t, dtype, a: t.math(name, a)


def _function(function: Callable[..., Value]) -> Emit:
    return lambda t, dtype, *args: function(*args)


def _floor_divide(t: Text, dtype: str, a: Value, b: Value) -> Value:
    """Toward minus infinity. An integer divisor must not be zero: rules admit only constants."""
    if dtype in FLOATS:
        return t.math("floor", a / b)
    if dtype == "u8":
        return a // b
    quotient = _op("arith.divsi")(t, dtype, a, b)
    exact = (quotient * b).equals(a)
    opposite = _op("arith.xori")(t, dtype, a, b) < 0
    return t.select(exact, quotient, t.select(opposite, quotient - 1, quotient))


def _remainder(t: Text, dtype: str, a: Value, b: Value) -> Value:
    """With the sign of b; integers only."""
    return a - _floor_divide(t, dtype, a, b) * b


def _sign(t: Text, dtype: str, a: Value) -> Value:
    """-1, 0 or 1; 0 for NaN."""
    above = t.select(a > 0, t.constant(1, a.type), t.constant(0, a.type))
    return t.select(a < 0, t.constant(-1, a.type), above)


def _absolute(t: Text, dtype: str, a: Value) -> Value:
    return t.math("absf", a) if dtype in FLOATS else a.most(0 - a)


# Every operation takes the text, the dtype of its operands (of its result for `where` and `to`) and their registers.
OPS: dict[str, Emit] = {
    "add": _by_kind(_op("arith.addf"), _op("arith.addi"), _op("arith.ori")),
    "sub": _by_kind(_op("arith.subf"), _op("arith.subi")),
    "mul": _by_kind(_op("arith.mulf"), _op("arith.muli"), _op("arith.andi")),
    "div": _op("arith.divf"),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "pow": _function(elementary.pow),
    "maximum": _extreme("max"),
    "minimum": _extreme("min"),
    "and": _op("arith.andi"),
    "or": _op("arith.ori"),
    "xor": _op("arith.xori"),
    "not": lambda t, dtype, a: _op("arith.xori")(t, dtype, a, t.constant(1 if dtype == "bool" else -1, a.type)),
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "where": lambda t, dtype, condition, a, b: t.select(condition, a, b),
    "neg": _by_kind(_function(lambda a: -a), _function(lambda a: 0 - a)),
    "abs": _absolute,
    "sign": _sign,
    "sqrt": _math("sqrt"),
    "rsqrt": lambda t, dtype, a: 1.0 / t.math("sqrt", a),
    "reciprocal": lambda t, dtype, a: 1.0 / a,
    "floor": _math("floor"),
    "ceil": _math("ceil"),
    "trunc": _math("trunc"),
    "round": _math("roundeven"),
    "bitcast": lambda t, dtype, a: t.cast("bitcast", a, "i32" if dtype == "f32" else "f32"),
    "isnan": lambda t, dtype, a: a.compare("uno", a),
    "isinf": lambda t, dtype, a: t.math("absf", a).equals(math.inf),
    **{
        name: _function(getattr(elementary, name))
        for name in ("log", "log1p", "expm1", "softplus", "sin", "cos")
    },
    "exp": _function(vecmath.exp),
    "erf": _function(vecmath.erf),
    **{name: _function(function) for name, function in vecmath.ACTIVATIONS.items()},
}  # fmt: skip
