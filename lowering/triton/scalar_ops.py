"""The operations inside a pointwise kernel (lowering.pointwise.OPS) as Triton text: name -> expression of its operands."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from qcompile.expr import FLOATS
from qcompile.lowering.triton.text import DTYPES

Emit = Callable[..., str]


def constant(value: float | str, dtype: str) -> str:
    """A number as an operand beside values of `dtype`."""
    if dtype == "bool":
        return f"tl.full([], {int(bool(value))}, tl.int1)"
    if dtype not in FLOATS:
        return f"tl.full([], {int(value)}, {DTYPES[dtype]})"
    number = float(value)
    if not math.isfinite(number) or abs(number) > 3.4028235677973366e38:
        return f'float("{number if math.isnan(number) else math.copysign(math.inf, number)}")'
    number = struct.unpack("<f", struct.pack("<f", number))[0]
    return repr(number) if number >= 0 and math.copysign(1.0, number) > 0 else f"({number!r})"


def _infix(sign: str, booleans: str = "") -> Emit:
    return lambda dtype, a, b: f"{a} {booleans if dtype == 'bool' and booleans else sign} {b}"


def _call(name: str) -> Emit:
    return lambda dtype, *args: f"{name}({', '.join(args)})"


def _extreme(name: str) -> Emit:
    """NaN wins over every number."""

    def emit(dtype: str, a: str, b: str) -> str:
        if dtype == "bool":
            return f"{a} {'|' if name == 'maximum' else '&'} {b}"
        return f"tl.{name}({a}, {b}{', propagate_nan=tl.PropagateNan.ALL' if dtype in FLOATS else ''})"

    return emit


def _floor_divide(dtype: str, a: str, b: str) -> str:
    return f"tl.floor(tl.div_rn({a}, {b}))" if dtype in FLOATS else f"floor_divide({a}, {b})"


def _not(dtype: str, a: str) -> str:
    return f"{a} == 0" if dtype == "bool" else f"~{a}"


# Every operation takes the dtype of its operands (of its result for `where`) and their texts, which are names or numbers.
OPS: dict[str, Emit] = {
    "add": _infix("+", "|"),
    "sub": _infix("-"),
    "mul": _infix("*", "&"),
    "div": _call("tl.div_rn"),
    "floor_divide": _floor_divide,
    "remainder": lambda dtype, a, b: f"{a} - floor_divide({a}, {b}) * {b}",
    "pow": lambda dtype, a, b: f"power({_value(a)}, {_value(b)})",
    "maximum": _extreme("maximum"),
    "minimum": _extreme("minimum"),
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "not": _not,
    "eq": _infix("=="),
    "ne": _infix("!="),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "where": _call("tl.where"),
    "neg": lambda dtype, a: f"-{a}" if dtype in FLOATS else f"{constant(0, dtype)} - {a}",
    "abs": _call("tl.abs"),
    "sign": lambda dtype, a: f"({a} > 0).to({_type(dtype)}) - ({a} < 0).to({_type(dtype)})",
    "sqrt": _call("tl.sqrt_rn"),
    "rsqrt": lambda dtype, a: f"tl.div_rn(1.0, tl.sqrt_rn({a}))",
    "reciprocal": lambda dtype, a: f"tl.div_rn(1.0, {a})",
    "floor": _call("tl.floor"),
    "ceil": _call("tl.ceil"),
    "trunc": _call("truncate"),
    "round": _call("round_even"),
    "bitcast": lambda dtype, a: f"{a}.to({'tl.int32' if dtype == 'f32' else 'tl.float32'}, bitcast=True)",
    "isnan": lambda dtype, a: f"{a} != {a}",
    "isinf": lambda dtype, a: f'tl.abs({a}) == float("inf")',
    "log": _call("tl.log"),
    "sin": _call("tl.sin"),
    "cos": _call("tl.cos"),
    "erf": _call("tl.erf"),
    "relu": lambda dtype, a: f"tl.where({a} < 0.0, 0.0, {a})",
    **{
        name: _call(name)
        for name in ("exp", "expm1", "log1p", "softplus", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")
    },
}


def _type(dtype: str) -> str:
    return "tl.float32" if dtype in FLOATS else DTYPES[dtype]


def _value(text: str) -> str:
    """A number as a value: functions convert what they are given."""
    return text if text.startswith("v") else f"tl.full([], {text}, tl.float32)"
