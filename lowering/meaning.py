"""What ATen's pointwise operators mean in the operations that a pointwise kernel has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from qcompile.dtypes import DTYPES, NAMES
from qcompile.expr import FLOATS
from qcompile.lowering.base import Refuse

Ref = int | dict[str, Any]
Read = Callable[["Reader", Node], Ref]


class Reader:
    """Collects the operations that FX nodes mean. Floats compute in f32 and are rounded to the node's dtype at its end."""

    def __init__(self, inputs: Sequence[tuple[Node, str]]):
        self.ops: list[Any] = []
        self.dtypes = [dtype for _, dtype in inputs]
        self._values: dict[Node, Ref] = {}
        for i, (node, dtype) in enumerate(inputs):
            _known(dtype)
            self._values[node] = self.to(i, _dtype(node) if "val" in node.meta else dtype)

    def read(self, node: Node) -> int:
        """The number of the value that `node` computes."""
        name = operator(node)
        if name not in READ:
            raise Refuse(f"{name} is not a pointwise operation of the kernels")
        dtype = _dtype(node)
        _known(dtype)
        if dtype == "f8e8m0":
            raise Refuse("no kernel rounds to f8e8m0")
        ref = self.to(READ[name](self, node), dtype)
        if not isinstance(ref, int):
            ref = self.op("full", dtype, ref)
        self._values[node] = ref
        return ref

    def tensor(self, item: Any) -> int:
        ref = self.ref(item)
        if not isinstance(ref, int):
            raise Refuse("a region that gives a number")
        return ref

    def ref(self, item: Any) -> Ref:
        """The value of an argument: a node seen before, or a number."""
        if isinstance(item, Node):
            if item not in self._values:
                raise Refuse(f"the operand {item.name} is not a tensor")
            return self._values[item]
        if isinstance(item, (bool, int, float)):
            return number(item)
        raise Refuse(f"an operand that is neither a tensor nor a number: {item!r}")

    def op(self, name: str, dtype: str, *refs: Ref) -> int:
        self.ops.append([name, dtype, list(refs)])
        self.dtypes.append(dtype)
        # Values are numbered inputs first, then operations.
        return len(self.dtypes) - 1

    def to(self, ref: Ref, dtype: str) -> Ref:
        if not isinstance(ref, int) or self.dtypes[ref] == dtype:
            return ref
        return self.op("to", dtype, ref)

    def apply(self, name: str, dtype: str, *items: Any) -> int:
        """`name` on the arguments `items`, converted to `dtype`."""
        return self.op(name, dtype, *(self.to(self.ref(item), dtype) for item in items))

    def f32(self, node: Node, index: int = 0) -> Ref:
        return self.to(self.ref(node.args[index]), "f32")


def operator(node: Node) -> str:
    """The node's operator as `READ` names it: overloads of one operator mean the same, but for a few."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return _OVERLOADS.get(node.target, str(node.target.overloadpacket))


_OVERLOADS = {
    torch.ops.aten.view.dtype: "aten.view.dtype",
    torch.ops.aten.max.other: "aten.maximum",
    torch.ops.aten.min.other: "aten.minimum",
}


def number(value: float) -> dict[str, Any]:
    """A number as JSON holds it: infinities and NaN are text."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return {"number": value if finite else str(value)}


def _known(dtype: str) -> None:
    if dtype not in DTYPES:
        raise Refuse(f"no pointwise kernel for elements of dtype {dtype}")


def _dtype(node: Node) -> str:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise Refuse(f"the operand {node.name} is not a tensor")
    return NAMES.get(value.dtype, str(value.dtype))


def _wide(dtype: str) -> str:
    return "f32" if dtype in FLOATS else dtype


def _arg(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _common(*items: Any) -> str:
    """The dtype that torch computes in for these arguments."""
    found = [item.meta["val"] if isinstance(item, Node) else item for item in items]
    if len(found) == 1:
        return _wide(NAMES[found[0].dtype])
    return _wide(NAMES[torch.result_type(*found)])


def _same(name: str) -> Read:
    """All arguments and the result in the dtype of the result."""
    return lambda r, node: r.apply(name, _wide(_dtype(node)), *node.args)


def _float(name: str) -> Read:
    """One argument, in float."""
    return lambda r, node: r.op(name, "f32", r.f32(node))


def _compare(name: str) -> Read:
    def read(r: Reader, node: Node) -> Ref:
        dtype = _common(*node.args[:2])
        a, b = (r.to(r.ref(item), dtype) for item in node.args[:2])
        if not isinstance(a, int):
            a, b = b, a
            return r.op({"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(name, name), "bool", a, b)
        return r.op(name, "bool", a, b)

    return read


def _boolean(name: str) -> Read:
    return lambda r, node: r.apply(name, "bool", *node.args)


def _scaled(name: str, reverse: bool = False) -> Read:
    """a + alpha * b, a - alpha * b, or with the two exchanged."""

    def read(r: Reader, node: Node) -> Ref:
        dtype = _wide(_dtype(node))
        a, b = (r.to(r.ref(item), dtype) for item in node.args[:2])
        if reverse:
            a, b = b, a
        alpha: Any = _arg(node, 2, "alpha", 1)
        if alpha != 1:
            b = r.op("mul", dtype, b, number(alpha)) if isinstance(b, int) else number(b["number"] * alpha)
        return r.op(name, dtype, a, b)

    return read


def _divide(r: Reader, node: Node) -> Ref:
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return _floor_divide(r, node)
    quotient = r.apply("div", "f32", *node.args[:2])
    if mode == "trunc":
        if _dtype(node) not in FLOATS:
            raise Refuse("integer division toward zero")
        return r.op("trunc", "f32", quotient)
    return quotient


def _floor_divide(r: Reader, node: Node) -> Ref:
    dtype = _wide(_dtype(node))
    if dtype != "f32":
        _constant_divisor(node)
    return r.apply("floor_divide", dtype, *node.args[:2])


def _remainder(r: Reader, node: Node) -> Ref:
    dtype = _dtype(node)
    if dtype in FLOATS:
        raise Refuse("remainder of floats")
    _constant_divisor(node)
    return r.apply("remainder", dtype, *node.args[:2])


def _constant_divisor(node: Node) -> None:
    if not isinstance(node.args[1], int) or node.args[1] <= 0:
        raise Refuse("integer division by a number that may be zero or negative")


def _power(r: Reader, node: Node) -> Ref:
    base, exponent = node.args[:2]
    if _dtype(node) not in FLOATS:
        raise Refuse("integer powers")
    if isinstance(exponent, (int, float)):
        x = r.f32(node)
        if exponent in (2, 3):
            square = r.op("mul", "f32", x, x)
            return square if exponent == 2 else r.op("mul", "f32", square, x)
        simple = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
        if simple:
            return r.op(simple, "f32", x)
        if exponent == 1:
            return x
    return r.apply("pow", "f32", base, exponent)


def _clamp(r: Reader, node: Node) -> Ref:
    dtype = _wide(_dtype(node))
    value = r.to(r.ref(node.args[0]), dtype)
    for name, limit in (("maximum", _arg(node, 1, "min", None)), ("minimum", _arg(node, 2, "max", None))):
        if limit is not None:
            value = r.op(name, dtype, value, r.to(r.ref(limit), dtype))
    return value


def _limit(name: str) -> Read:
    return lambda r, node: r.apply(name, _wide(_dtype(node)), *node.args[:2])


def _within(r: Reader, x: Ref, low: float, high: float) -> int:
    return r.op("minimum", "f32", r.op("maximum", "f32", x, number(low)), number(high))


def _where(r: Reader, node: Node) -> Ref:
    dtype = _wide(_dtype(node))
    condition, yes, no = (r.ref(item) for item in node.args[:3])
    return r.op("where", dtype, r.to(condition, "bool"), r.to(yes, dtype), r.to(no, dtype))


def _masked_fill(r: Reader, node: Node) -> Ref:
    dtype = _wide(_dtype(node))
    x, mask, value = (r.ref(item) for item in node.args[:3])
    return r.op("where", dtype, mask, r.to(value, dtype), r.to(x, dtype))


def _value(r: Reader, node: Node) -> Ref:
    """The first argument; the conversion to the dtype of the result follows."""
    return r.ref(node.args[0])


def _relu(r: Reader, node: Node) -> Ref:
    dtype = _wide(_dtype(node))
    return r.op("maximum", dtype, r.to(r.ref(node.args[0]), dtype), number(0))


def _relu6(r: Reader, node: Node) -> Ref:
    return _within(r, r.f32(node), 0.0, 6.0)


def _gelu(r: Reader, node: Node) -> Ref:
    return r.op("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu", "f32", r.f32(node))


def _leaky_relu(r: Reader, node: Node) -> Ref:
    x = r.f32(node)
    slope = r.op("mul", "f32", x, number(_arg(node, 1, "negative_slope", 0.01)))
    return r.op("where", "f32", r.op("gt", "bool", x, number(0.0)), x, slope)


def _elu(r: Reader, node: Node) -> Ref:
    alpha, scale, inside = (_arg(node, i, name, 1) for i, name in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    x = r.f32(node)
    below = r.op("expm1", "f32", r.op("mul", "f32", x, number(inside)))
    below = r.op("mul", "f32", below, number(alpha * scale))
    return r.op("where", "f32", r.op("gt", "bool", x, number(0.0)), r.op("mul", "f32", x, number(scale)), below)


def _hardtanh(r: Reader, node: Node) -> Ref:
    return _within(r, r.f32(node), _arg(node, 1, "min_val", -1.0), _arg(node, 2, "max_val", 1.0))


def _hardsigmoid(r: Reader, node: Node) -> Ref:
    inside = _within(r, r.op("add", "f32", r.f32(node), number(3.0)), 0.0, 6.0)
    return r.op("mul", "f32", inside, number(1 / 6))


def _hardswish(r: Reader, node: Node) -> Ref:
    return r.op("mul", "f32", r.f32(node), _hardsigmoid(r, node))


def _mish(r: Reader, node: Node) -> Ref:
    return r.op("mul", "f32", r.f32(node), r.op("tanh", "f32", r.op("softplus", "f32", r.f32(node))))


def _softplus(r: Reader, node: Node) -> Ref:
    """log(1 + e^(beta x)) / beta; beyond the threshold torch returns x, which float32 gives anyway."""
    beta = _arg(node, 1, "beta", 1)
    if beta == 1:
        return r.op("softplus", "f32", r.f32(node))
    return r.op("mul", "f32", r.op("softplus", "f32", r.op("mul", "f32", r.f32(node), number(beta))), number(1 / beta))


def _times(name: str, before: float, after: float) -> Read:
    """name(x * before) * after."""

    def read(r: Reader, node: Node) -> Ref:
        x = r.f32(node)
        x = r.op(name, "f32", x if before == 1 else r.op("mul", "f32", x, number(before)))
        return x if after == 1 else r.op("mul", "f32", x, number(after))

    return read


def _square(r: Reader, node: Node) -> Ref:
    return r.apply("mul", _wide(_dtype(node)), node.args[0], node.args[0])


def _addc(name: str) -> Read:
    """input + value * (a op b)."""

    def read(r: Reader, node: Node) -> Ref:
        a, b, c = (r.to(r.ref(item), "f32") for item in node.args[:3])
        product = r.op("mul", "f32", r.op(name, "f32", b, c), number(_arg(node, 3, "value", 1)))
        return r.op("add", "f32", a, product)

    return read


def _lerp(r: Reader, node: Node) -> Ref:
    a, b, weight = (r.to(r.ref(item), "f32") for item in node.args[:3])
    return r.op("add", "f32", a, r.op("mul", "f32", r.op("sub", "f32", b, a), weight))


def _full(index: int | None, value: float = 0.0) -> Read:
    """A number everywhere: argument `index`, or `value`."""

    def read(r: Reader, node: Node) -> Ref:
        found = value if index is None else node.args[index]
        return r.op("full", _dtype(node), r.ref(found))

    return read


def _bits(r: Reader, node: Node) -> Ref:
    """The same bits as another dtype: between f32 and i32 only, which lie in registers as they do in memory."""
    ref, dtype = r.tensor(node.args[0]), _dtype(node)
    if {r.dtypes[ref], dtype} != {"f32", "i32"}:
        raise Refuse(f"a view of {r.dtypes[ref]} bits as {dtype}")
    return r.op("bitcast", dtype, ref)


def _test(name: str) -> Read:
    return lambda r, node: r.op(name, "bool", r.f32(node))


def _arange(r: Reader, node: Node) -> Ref:
    numbers = [item for item in node.args]
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1)
    if not isinstance(start, int) or not isinstance(step, int):
        raise Refuse("arange from a size or of floats")
    return r.op("add", "i64", r.op("mul", "i64", r.op("index", "i64"), number(step)), number(start))


_FLOAT = (
    "sqrt", "rsqrt", "reciprocal", "floor", "ceil", "trunc", "round", "exp", "expm1", "log", "log1p", "sin", "cos",
    "tanh", "erf", "sigmoid", "silu",
)  # fmt: skip
_MEANINGS: dict[str, Read] = {
    "add": _scaled("add"), "sub": _scaled("sub"), "rsub": _scaled("sub", reverse=True), "mul": _same("mul"),
    "div": _divide, "floor_divide": _floor_divide, "remainder": _remainder, "pow": _power, "square": _square,
    "maximum": _same("maximum"), "minimum": _same("minimum"), "clamp": _clamp, "clamp_min": _limit("maximum"),
    "clamp_max": _limit("minimum"), "addcmul": _addc("mul"), "addcdiv": _addc("div"), "lerp": _lerp,
    "neg": _same("neg"), "abs": _same("abs"), "sign": _same("sign"), "where": _where, "masked_fill": _masked_fill,
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _float(name) for name in _FLOAT},
    "isnan": _test("isnan"), "isinf": _test("isinf"),
    "logical_and": _boolean("and"), "logical_or": _boolean("or"), "logical_xor": _boolean("xor"),
    "logical_not": _boolean("not"), "bitwise_not": _same("not"),
    "bitwise_and": _same("and"), "bitwise_or": _same("or"), "bitwise_xor": _same("xor"),
    "__and__": _same("and"), "__or__": _same("or"), "__xor__": _same("xor"),
    "relu": _relu, "relu6": _relu6, "gelu": _gelu, "leaky_relu": _leaky_relu, "elu": _elu, "mish": _mish,
    "hardtanh": _hardtanh, "hardswish": _hardswish, "hardsigmoid": _hardsigmoid, "softplus": _softplus,
    "exp2": _times("exp", math.log(2), 1), "log2": _times("log", 1, 1 / math.log(2)),
    "log10": _times("log", 1, 1 / math.log(10)),
    "to": _value, "_to_copy": _value, "clone": _value, "lift_fresh_copy": _value,
    "full": _full(1), "full_like": _full(1), "zeros": _full(None), "zeros_like": _full(None), "ones": _full(None, 1.0),
    "ones_like": _full(None, 1.0), "new_zeros": _full(None), "new_ones": _full(None, 1.0), "new_full": _full(2),
    "scalar_tensor": _full(0), "arange": _arange, "view.dtype": _bits,
}  # fmt: skip
READ: dict[str, Read] = {f"aten.{name}": read for name, read in _MEANINGS.items()} | {
    "prims.convert_element_type": _value
}
"""Operator -> what it means in the operations of pointwise.OPS, "to", "full" and "index"."""

FILLS = frozenset(
    f"aten.{name}" for name in ("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full")
)
"""Operators that look at no number of their tensor, whose shape may be another than the result's."""
